"""Weights of this project become a PyTorch file: what `--export` does."""

import json
import os
from typing import Any, NamedTuple

import numpy as np

from atebm_jax import archs, checkpoint, storage
from atebm_jax.convert.names import to_torch
from atebm_jax.errors import UserError
from atebm_jax.local_path import local

FORMATS = ("safetensors",)


class Exported(NamedTuple):
    """What was written: arrays, numbers in them, and the texts beside them."""

    num_arrays: int
    num_parameters: int
    metadata: dict[str, str]


def export(checkpoint_path: str, to: str, *, kind: str = "safetensors") -> Exported:
    """Writes averaged weights with PyTorch's names and layouts.

    The file loads with `strict=True` into timm's ResNets, ConvNeXts and ViTs and into
    the usual WideResNet. Normalisation is no weight: mean and std are in the metadata.

    Args:
      checkpoint_path: a workdir, a stage's folder or one step's.
      to: a file that is not there yet.
      kind: one of `FORMATS`.

    Raises:
      UserError: no checkpoint, the file is there, or it cannot be written.
    """
    if kind not in FORMATS:
        raise UserError(f"unknown --export={kind}: choose one of {', '.join(FORMATS)}.")
    to = os.path.abspath(local("--to", to))
    if os.path.exists(to):
        raise UserError(f"--to={to} is there already: give a new file.")
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise UserError(
            "--export=safetensors needs the package safetensors: pip install "
            "'atebm_jax[convert]'."
        ) from error
    variables, meta = checkpoint.load_weights(checkpoint_path)
    model = meta["config"]["model"]
    arrays = to_torch(model["name"], {k: v for k, v in variables.items() if v})
    parameters = sum(array.size for array in arrays.values())
    arrays |= _counters(arrays)
    metadata = _metadata(model)
    names = checkpoint.class_names(meta)
    if names is not None:
        metadata["atebm_jax.class_names"] = json.dumps(names)
    with storage.appears_whole(to) as made:
        save_file(arrays, made, metadata=metadata)
    return Exported(len(arrays), int(parameters), metadata)


def _counters(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """PyTorch's batch normalisation counts batches, and some loaders insist on it."""
    return {
        name.replace("running_mean", "num_batches_tracked"): np.zeros((), np.int64)
        for name in arrays
        if name.endswith(".running_mean")
    }


def _metadata(model: dict[str, Any]) -> dict[str, str]:
    name = archs.name_of(model)
    return {
        "format": "pt",
        "atebm_jax.arch": name or model["name"],
        "atebm_jax.mean": json.dumps(list(model["mean"])),
        "atebm_jax.std": json.dumps(list(model["std"])),
        "atebm_jax.activation": model["activation"],
    }
