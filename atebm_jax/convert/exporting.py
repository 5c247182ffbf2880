"""Exports weights to a file for PyTorch: what `--export` does."""

import json
import os

from safetensors.numpy import save_file

from atebm_jax import archs, checkpoint, storage
from atebm_jax.convert.names import known, to_torch
from atebm_jax.convert.normalization import Normalization, described
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
    arrays |= known(model["name"]).beside(arrays)
    texts = {
        "arch": archs.name_of(model) or model["name"],
        "mean": json.dumps(list(model["mean"])),
        "std": json.dumps(list(model["std"])),
        "standardize": str(model.get("standardize", False)),
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
    by_image = model.get("standardize", False)
    if model["mean"] or by_image:
        of = Normalization(model["mean"], model["std"], "", by_image=by_image)
        said.append(
            f"they expect normalised images: {described(of)} (in the file's metadata)"
        )
    return said
