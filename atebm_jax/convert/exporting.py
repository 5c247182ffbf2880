"""Exports weights to a file for PyTorch, or to a folder: what `--export` does."""

import json
import os
from typing import Any

import numpy as np
from etils import epath
from safetensors.numpy import save_file

from atebm_jax import archs, checkpoint, storage, zoo
from atebm_jax import config as configuration
from atebm_jax.convert.names import known, to_torch
from atebm_jax.convert.normalization import described
from atebm_jax.errors import UserError
from atebm_jax.local_path import local


def export(checkpoint_path: str, to: str) -> list[str]:
    """Writes averaged weights with PyTorch's names and layouts.

    The file loads with `strict=True` into timm's ResNets, ConvNeXts and transformers,
    and into the classes of RobustBench and JEM for small images. Normalisation is no
    weight: mean and std are in the metadata.

    Args:
      checkpoint_path: a workdir, a stage's folder or one step's.
      to: a file that is not there yet.

    Returns:
      Sentences that say what was written.

    Raises:
      UserError: no checkpoint, the file is there, or it cannot be written.
    """
    to = os.path.abspath(local("--to", to))
    if os.path.exists(to):
        raise UserError(f"--to={to} is there already: give a new file.")
    variables, meta = checkpoint.load_weights(checkpoint_path)
    model, classes = meta["config"]["model"], checkpoint.class_names(meta)
    arrays = to_torch(model["name"], {k: v for k, v in variables.items() if v})
    parameters = sum(array.size for array in arrays.values())
    # PyTorch's batch normalisation counts batches, and some loaders need the count.
    for name in [name for name in arrays if name.endswith(".running_mean")]:
        counter = name.replace("running_mean", "num_batches_tracked")
        arrays[counter] = np.zeros((), np.int64)
    texts = {
        "arch": archs.name_of(model) or model["name"],
        "mean": json.dumps(list(model["mean"])),
        "std": json.dumps(list(model["std"])),
        "activation": model["activation"],
        **{field: str(model[field]) for field in known(model["name"]).unsaid(model)},
    }
    if classes is not None:
        texts["class_names"] = json.dumps(classes)
    metadata = {f"atebm_jax.{name}": text for name, text in texts.items()}
    with storage.appears_whole(to) as made:
        save_file(arrays, made, metadata=metadata | {"format": "pt"})
    counted = f"{len(arrays)} arrays with {parameters:,} numbers"
    said = [f"{counted} ({texts['arch']}) are in {to}"]
    if model["mean"]:
        numbers = described(model["mean"], model["std"])
        said.append(
            f"they expect normalised images: {numbers} (in the file's metadata)"
        )
    return said


# In the report of a job: what says how its figures were measured.
_PROTOCOL = ("seed", "notes", "device", "versions")


def to_zoo(
    checkpoint_path: str, to: str, *, command: str | None, licence: str | None
) -> list[str]:
    """Writes a light checkpoint (`atebm_jax.zoo`), which every command reads.

    It has the figures of the workdir's report, if that is of the same step.

    Args:
      checkpoint_path: a workdir, a stage's folder or one step's.
      to: a folder that is not there yet.
      command: what trained the weights, for the reader.
      licence: of the weights.

    Returns:
      A sentence that says what was written.

    Raises:
      UserError: no checkpoint, something is there, it cannot be written, or a weight is
        too large for float16.
    """
    if os.path.exists(local("--to", to)):
        raise UserError(f"--to={to} is there already: give a new folder.")
    arrays, meta = checkpoint.load_weights(checkpoint_path)
    if "seeds" in meta:
        arrays["seeds"] = meta.pop("seeds")
    # Where data lay on the machine of the training says nothing to others.
    config = configuration.complete(meta["config"])
    config["data"]["data_dir"] = ""
    meta.pop("watch", None)
    meta |= {"config": config, "licence": licence, "command": command}
    meta |= {"report": _report(checkpoint_path, meta["stage"], meta["step"])}
    with storage.appears_whole(to) as made:
        os.mkdir(made)
        zoo.write(epath.Path(made), arrays, meta)
        size = os.path.getsize(os.path.join(made, zoo.WEIGHTS))
    said = f"weights of {meta['stage']}, step {meta['step']}, in float16"
    return [f"{said} ({size:,} bytes) are in {to}, which is read like a workdir"]


def _report(checkpoint_path: str, stage: str, step: int) -> dict[str, Any] | None:
    """A step's figures in the report of its workdir; None where there are none."""
    try:
        path = zoo.reached(checkpoint_path) / "report.json"
        report = json.loads(path.read_text())
        figures = report["stages"][stage]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if figures.get("step") != step:
        return None
    protocol = {name: report[name] for name in _PROTOCOL if name in report}
    return {"figures": figures} | protocol
