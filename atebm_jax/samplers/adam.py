"""Adam's direction (Kingma and Ba, 2015), with steps of a given length."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from atebm_jax.errors import UserError
from atebm_jax.samplers.base import ProjectFn, Sampler, is_decay, unit

_OFFSET = 1e-8


class State(NamedTuple):
    """images, mean, square: [B, H, W, C] float32; steps: [B, 1, 1, 1] float32."""

    images: jax.Array
    mean: jax.Array
    square: jax.Array
    steps: jax.Array


def adam(beta1: float = 0.9, beta2: float = 0.999) -> Sampler:
    """Adam ascent; its direction is scaled to length one.

    Step sizes are then L2 pixels per step, as of `pgd`.

    Args:
      beta1, beta2: decays of mean and square of the gradients, in [0, 1).

    Raises:
      UserError: any other decay.
    """
    if not (is_decay(beta1) and is_decay(beta2)):
        raise UserError(
            f"Adam's decays are beta1={beta1!r}, beta2={beta2!r}: expected numbers in "
            "[0, 1), in float32 too."
        )

    def init(seeds: jax.Array) -> State:
        zero = jnp.zeros_like(seeds)
        return State(seeds, zero, zero, zero[:, :1, :1, :1])

    def step(
        keys: jax.Array,
        gradients: jax.Array,
        state: State,
        step_size: jax.Array,
        project: ProjectFn,
    ) -> State:
        del keys
        steps = state.steps + 1.0
        mean = beta1 * state.mean + (1 - beta1) * gradients
        square = beta2 * state.square + (1 - beta2) * jnp.square(gradients)
        root = jnp.sqrt(square / (1 - beta2**steps))
        direction = mean / (1 - beta1**steps) / (root + _OFFSET)
        images = project(state.images + step_size * unit(direction))
        return State(images, mean, square, steps)

    return Sampler(init, step)
