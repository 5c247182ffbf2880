"""PyTorch weights in: names and layouts of the WideResNet reference to ours."""

import re
from collections.abc import Mapping
from typing import Any

import flax
import numpy as np

from atebm_jax.errors import UserError

_BLOCK = re.compile(r"^(block\d)\.layer\.(\d+)\.")


def wide_resnet_from_torch(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Turns a PyTorch WideResNet's state dict into Flax variables.

    Args:
      state_dict: arrays under the names of the usual PyTorch WideResNet
        (`block1.layer.0.bn1.weight`, ...); convolutions OIHW, `fc` [out, in].
        `num_batches_tracked` is passed over.

    Returns:
      {"params": ..., "batch_stats": ...}; convolutions HWIO, dense [in, out].

    Raises:
      UserError: a name that no WideResNet has.
    """
    flat = {}
    for name, array in state_dict.items():
        if not name.endswith("num_batches_tracked"):
            path, value = _translate(name, np.asarray(array))
            flat[path] = value
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _translate(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    parts = _BLOCK.sub(r"\1_\2/", name).replace("convShortcut", "shortcut")
    module, _, leaf = parts.replace(".", "/").rpartition("/")
    if leaf in ("running_mean", "running_var"):
        return f"batch_stats/{module}/{leaf.removeprefix('running_')}", array
    if leaf == "bias":
        return f"params/{module}/bias", array
    if leaf == "weight" and array.ndim == 4:
        return f"params/{module}/kernel", array.transpose(2, 3, 1, 0)
    if leaf == "weight" and array.ndim == 2:
        return f"params/{module}/kernel", array.T
    if leaf == "weight" and array.ndim == 1:
        return f"params/{module}/scale", array
    raise UserError(
        f"{name!r} with shape {array.shape} is no parameter of a WideResNet: expected "
        "names such as 'block1.layer.0.conv1.weight' or 'fc.bias'."
    )
