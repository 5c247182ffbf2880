"""Normalised gradient ascent with momentum (Dong et al., 2018)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from atebm_jax.errors import UserError
from atebm_jax.samplers.base import ProjectFn, Sampler, is_decay, unit


class State(NamedTuple):
    """images, velocity: [B, H, W, C] float32."""

    images: jax.Array
    velocity: jax.Array


def momentum(decay: float = 0.9) -> Sampler:
    """v <- decay v + g / ||g||_1, x <- P(x + step_size * v / ||v||_2).

    Args:
      decay: of the velocity, in [0, 1); with 0 it is `pgd`.

    Raises:
      UserError: any other decay.
    """
    if not is_decay(decay):
        raise UserError(
            f"momentum decay is {decay!r}: it must lie in [0, 1), in float32 too."
        )

    def init(seeds: jax.Array) -> State:
        return State(seeds, jnp.zeros_like(seeds))

    def step(
        keys: jax.Array,
        gradients: jax.Array,
        state: State,
        step_size: jax.Array,
        project: ProjectFn,
    ) -> State:
        del keys
        length = jnp.abs(gradients).sum(axis=(1, 2, 3), keepdims=True)
        velocity = decay * state.velocity + gradients / (length + 1e-10)
        return State(project(state.images + step_size * unit(velocity)), velocity)

    return Sampler(init, step)
