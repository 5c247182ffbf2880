"""Stochastic gradient Langevin dynamics, as JEM samples (Grathwohl et al., 2020)."""

from typing import NamedTuple

import jax
import numpy as np

from atebm_jax.errors import UserError
from atebm_jax.samplers.base import ProjectFn, Sampler

_LARGEST = float(np.finfo(np.float32).max)


class State(NamedTuple):
    """images: [B, H, W, C] float32 in [0, 1]."""

    images: jax.Array


def sgld(noise: float = 0.01) -> Sampler:
    """x <- P(x + step_size * g + noise * n), n standard normal.

    The step size multiplies the gradient itself. JEM takes 1 with noise 0.01 on images
    in [-1, 1]; on these, in [0, 1], that is step size 0.25 with "sgld(noise=0.005)".
    Langevin dynamics proper would have noise = sqrt(2 * step_size).

    Args:
      noise: standard deviation, pixels of a [0, 1] image, finite and >= 0.

    Raises:
      UserError: it is negative or not finite.
    """
    if not 0 <= noise <= _LARGEST:
        raise UserError(
            f"SGLD's noise is {noise!r}: it must be finite and not negative, in "
            "float32 too."
        )

    def step(
        keys: jax.Array,
        gradients: jax.Array,
        state: State,
        step_size: jax.Array,
        project: ProjectFn,
    ) -> State:
        shape = state.images.shape[1:]
        normal = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        moved = state.images + step_size * gradients + noise * normal
        return State(project(moved))

    return Sampler(State, step, by_length=False)
