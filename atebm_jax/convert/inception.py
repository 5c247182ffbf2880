"""The weights of Inception-v3 from a PyTorch or safetensors file."""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from atebm_jax.convert import files, state_dicts
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
    arrays, sha256 = state_dicts.read(path, partial(_other, path))
    return from_torch(arrays, path), sha256


def from_torch(
    weights: Mapping[str, np.ndarray], path: str = "the state dict"
) -> dict[str, Any]:
    """Variables of the Flax network from a state dict of arrays in PyTorch's layout.

    Raises:
      UserError: a weight is missing, or has another shape.
    """
    network, refuse = inception.InceptionV3(), partial(_other, path)
    name = inception.torch_name
    return state_dicts.arranged(weights, network, inception.SIZE, name, refuse)


def _other(path: str, what: str) -> UserError:
    return files.refusal(
        f"{path} is not the Inception-v3 of the Frechet Inception distance ({what}): "
        f"expected {PUBLISHED} or the same as safetensors (docs/inception.md)."
    )
