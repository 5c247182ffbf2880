"""Logits on one fixed image, to compare with those of the original in PyTorch."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np

from atebm_jax.models import logits_fn


def image(shape: tuple[int, int, int]) -> np.ndarray:
    """The fixed image of a shape (H, W, C): [H, W, C] float32 in [0, 1]."""
    i, j, c = np.indices(shape)
    return np.asarray((3 * i + 5 * j + 7 * c) % 32 / 31, np.float32)


def logits(model: nn.Module, variables: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """Logits of the fixed image, [K] float32, at full precision of the matrices."""
    with jax.default_matmul_precision("float32"):
        run = jax.jit(lambda weights, x: logits_fn(model, weights)(x))
        return np.asarray(run(variables, image(shape)[None])[0])
