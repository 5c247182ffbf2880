"""Signed gradient ascent: the steps of a ball in the maximum norm."""

import jax
import jax.numpy as jnp

from atebm_jax.samplers.base import ProjectFn, Sampler
from atebm_jax.samplers.pgd import State


def sign() -> Sampler:
    """x <- P(x + step_size * sign(g)), step_size in Linf pixels (Madry et al., 2018).

    A pixel whose gradient is zero stays.
    """

    def step(
        keys: jax.Array,
        gradients: jax.Array,
        state: State,
        step_size: jax.Array,
        project: ProjectFn,
    ) -> State:
        del keys
        return State(project(state.images + step_size * jnp.sign(gradients)))

    return Sampler(State, step, by_length=False)
