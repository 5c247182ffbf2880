"""Ways to ascend a score from a seed, each an `init` and a `step`."""

from atebm_jax.samplers.base import Sampler
from atebm_jax.samplers.loop import proceed, run, trace
from atebm_jax.samplers.schedules import SCHEDULES
from atebm_jax.samplers.zoo import SAMPLERS, resolved, sampler, step_length

__all__ = ["SAMPLERS", "SCHEDULES", "Sampler"]
__all__ += ["proceed", "resolved", "run", "sampler", "step_length", "trace"]
