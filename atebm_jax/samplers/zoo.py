"""The samplers by name."""

from collections.abc import Callable
from typing import Any

from atebm_jax.errors import UserError
from atebm_jax.samplers.adam import adam
from atebm_jax.samplers.base import Sampler
from atebm_jax.samplers.momentum import momentum
from atebm_jax.samplers.pgd import pgd
from atebm_jax.samplers.sgld import sgld
from atebm_jax.samplers.sign import sign

#: Samplers by name.
SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "pgd": pgd,
    "momentum": momentum,
    "adam": adam,
    "sgld": sgld,
    "sign": sign,
}


def sampler(name: str, **settings: Any) -> Sampler:
    """A sampler by its name in `SAMPLERS`.

    Raises:
      UserError: unknown name, or a setting that it refuses.
    """
    if name not in SAMPLERS:
        raise UserError(
            f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}."
        )
    return SAMPLERS[name](**settings)
