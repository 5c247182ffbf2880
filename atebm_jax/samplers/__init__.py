"""Ways to ascend a score from a seed, each an `init` and a `step`."""

from atebm_jax.samplers.base import Sampler
from atebm_jax.samplers.loop import run, trace
from atebm_jax.samplers.schedules import SCHEDULES
from atebm_jax.samplers.zoo import SAMPLERS, sampler

__all__ = ["SAMPLERS", "SCHEDULES", "Sampler", "run", "sampler", "trace"]
