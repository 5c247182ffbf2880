"""Plain state dicts of one known network, as its variables: for scorers of images."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from atebm_jax import models
from atebm_jax.convert import files
from atebm_jax.errors import UserError

#: Our parameter's path -> the name of PyTorch's.
NameFn = Callable[[list[str]], str]
#: What does not fit -> the error that says so.
RefuseFn = Callable[[str], UserError]


def read(path: str | os.PathLike, refuse: RefuseFn) -> tuple[dict[str, Any], str]:
    """The arrays of a file by their names, and its SHA-256; nothing in it is run.

    Raises:
      UserError: it cannot be read, or holds no named weights.
    """
    source = files.open_source(path)
    if not isinstance(source.tree, Mapping):
        raise refuse("it holds no named weights")
    arrays = {k: source.read(v) for k, v in source.tree.items() if files.is_array(v)}
    return arrays, source.sha256


def arranged(
    weights: Mapping[str, np.ndarray],
    network: nn.Module,
    side: int,
    torch_name: NameFn,
    refuse: RefuseFn,
) -> dict[str, Any]:
    """Variables of a network of square RGB images from arrays in PyTorch's layouts.

    Raises:
      UserError: a weight is missing, or has another shape.
    """

    def leaf(where: tuple, like: Any) -> np.ndarray:
        name = torch_name([key.key for key in where[1:]])
        if name not in weights:
            raise refuse(f"{name} is missing")
        array = np.asarray(weights[name], np.float32)
        if array.ndim in (2, 4):
            array = array.transpose((2, 3, 1, 0) if array.ndim == 4 else (1, 0))
        if array.shape != like.shape:
            raise refuse(f"{name} has shape {np.shape(weights[name])}")
        return np.ascontiguousarray(array)

    expected = models.variable_shapes(network, (side, side, 3))
    return jax.tree_util.tree_map_with_path(leaf, expected)
