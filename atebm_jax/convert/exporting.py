"""Exports weights to a file for PyTorch, or to a folder: what `--export` does."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from safetensors.numpy import save_file

from atebm_jax import archs, checkpoint, storage, trained, zoo
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


def to_zoo(
    checkpoint_path: str,
    to: str,
    *,
    command: str | None = None,
    licence: str | None = None,
    report: str | None = None,
) -> list[str]:
    """Writes a light checkpoint (`atebm_jax.zoo`), which every command reads.

    Args:
      checkpoint_path: a workdir, a stage's folder or one step's.
      to: a folder that is not there yet.
      command: what trained the weights, for the reader.
      licence: of the weights.
      report: `report.json` of an evaluation of what this writes, for its figures.

    Returns:
      A sentence that says what was written.

    Raises:
      UserError: no checkpoint, something is there, it cannot be written, a weight is
        too large for float16, or the report is of other weights than float16's.
    """
    if os.path.exists(local("--to", to)):
        raise UserError(f"--to={to} is there already: give a new folder.")
    arrays, meta = checkpoint.load_weights(checkpoint_path)
    arrays = {name: tree for name, tree in arrays.items() if tree}
    if "seeds" in meta:
        arrays["seeds"] = meta.pop("seeds")
    rounded = zoo.rounded(arrays)
    # Where data lay on the machine of the training says nothing to others.
    config = configuration.complete(meta["config"])
    config["data"]["data_dir"] = ""
    meta.pop("watch", None)
    meta |= {"config": config, "licence": licence, "command": command}
    meta |= {"report": None if report is None else _figures(report, rounded)}
    with storage.appears_whole(to) as made:
        os.mkdir(made)
        zoo.write(epath.Path(made), rounded, meta)
        size = os.path.getsize(os.path.join(made, zoo.WEIGHTS))
    said = f"weights of {meta['stage']}, step {meta['step']}, in float16"
    return [f"{said} ({size:,} bytes) are in {to}, which is read like a workdir"]


def _figures(path: str, rounded: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation's report says, if it is of these weights."""
    try:
        report = json.loads(storage.reached(path).read_text())
        own = {name: report[name] for name in ("metrics", "versions", "device")}
        evaluated = report["checkpoint"]["averaged_weights_sha256"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"--report={path} is no report of an evaluation ({error}): give the "
            "report.json that python -m atebm_jax.evaluate wrote."
        ) from error
    weights = {name: tree for name, tree in rounded.items() if name != "seeds"}
    wide = jax.tree.map(lambda x: x.astype(np.float32), weights)
    if evaluated != trained.fingerprint({"batch_stats": {}} | wide):
        raise UserError(
            f"--report={path} is of other weights than these in float16: export "
            "without --report, evaluate what was written, and give that report."
        )
    return own
