"""Normalised gradient ascent: the paper's sampler (section 5)."""

from typing import NamedTuple

import jax

from atebm_jax.samplers.base import ProjectFn, Sampler, unit


class State(NamedTuple):
    """images: [B, H, W, C] float32 in [0, 1]."""

    images: jax.Array


def pgd() -> Sampler:
    """x <- P(x + step_size * g / ||g||_2), step_size in L2 pixels."""

    def step(
        keys: jax.Array,
        gradients: jax.Array,
        state: State,
        step_size: jax.Array,
        project: ProjectFn,
    ) -> State:
        del keys
        return State(project(state.images + step_size * unit(gradients)))

    return Sampler(State, step)
