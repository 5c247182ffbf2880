"""The weights of Inception-v3 from a PyTorch or safetensors file."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from atebm_jax import models
from atebm_jax.convert import files
from atebm_jax.errors import UserError
from atebm_jax.models import inception

# The published file, which carries the first digits of its SHA-256 in its name.
PUBLISHED = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def read(path: str | os.PathLike) -> tuple[dict[str, Any], str]:
    """Reads the TensorFlow-ported weights; nothing in the file is run.

    Args:
      path: the published `.pth` file or the same state dict as safetensors.

    Returns:
      (variables of `models.inception.InceptionV3`, SHA-256 of the file).

    Raises:
      UserError: no such file, or it holds other weights.
    """
    path = os.path.expanduser(os.fspath(path))
    if not os.path.isfile(path):
        raise UserError(
            f"there are no Inception weights at {path}: fetch {PUBLISHED} as "
            "docs/inception.md says, or score with --feature_extractor=model."
        )
    source = files.open_source(path)
    if not isinstance(source.tree, Mapping):
        raise _other(path, "it holds no named weights")
    arrays = {k: source.read(v) for k, v in source.tree.items() if files.is_array(v)}
    return from_torch(arrays, path), source.sha256


def from_torch(
    weights: Mapping[str, np.ndarray], path: str = "the state dict"
) -> dict[str, Any]:
    """Variables of the Flax network from a state dict of arrays in PyTorch's layout.

    Raises:
      UserError: a weight is missing, or has another shape.
    """

    def leaf(where: tuple, like: Any) -> np.ndarray:
        name = inception.torch_name([key.key for key in where[1:]])
        if name not in weights:
            raise _other(path, f"{name} is missing")
        array = np.asarray(weights[name], np.float32)
        if array.ndim in (2, 4):
            array = array.transpose((2, 3, 1, 0) if array.ndim == 4 else (1, 0))
        if array.shape != like.shape:
            raise _other(path, f"{name} has shape {np.shape(weights[name])}")
        return np.ascontiguousarray(array)

    shape = (inception.SIZE, inception.SIZE, 3)
    expected = models.variable_shapes(inception.InceptionV3(), shape)
    return jax.tree_util.tree_map_with_path(leaf, expected)


def _other(path: str, what: str) -> UserError:
    return files.refusal(
        f"{path} is not the Inception-v3 of the Frechet Inception distance ({what}): "
        f"expected {PUBLISHED} or the same as safetensors (docs/inception.md)."
    )
