"""What a sampler is: a state and a step, the same shape for all."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

#: images [B, H, W, C] -> images that are allowed, [B, H, W, C].
ProjectFn = Callable[[jax.Array], jax.Array]


class Sampler(NamedTuple):
    """A way to raise a score.

    Attributes:
      init: seeds [B, H, W, C] in [0, 1] -> state; every array of a state has the image
        first, so that images can stop one by one.
      step: (keys [B], gradients [B, H, W, C] at the state's images, state, step_size
        [] or [B, 1, 1, 1], project) -> state. Keys are new in every step.
      by_length: whether the step size is the L2 length of every step.
    """

    init: Callable[[jax.Array], Any]
    step: Callable[[jax.Array, jax.Array, Any, jax.Array, ProjectFn], Any]
    by_length: bool = True


def unit(x: jax.Array) -> jax.Array:
    """Each image scaled to L2 length one; zero where it is zero."""
    norm = jnp.sqrt(jnp.square(x).sum(axis=(1, 2, 3), keepdims=True))
    return x / (norm + 1e-10)


def is_decay(value: float) -> bool:
    """Whether a number lies in [0, 1), in float32 too, in which it is used."""
    return 0 <= value < 1 and bool(np.float32(value) < 1)


def clip(images: jax.Array) -> jax.Array:
    """No constraint but the range of pixels, [0, 1]."""
    return jnp.clip(images, 0.0, 1.0)
