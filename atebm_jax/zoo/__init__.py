"""Trained models in three small files; some are part of this package, as `zoo:NAME`.

A light checkpoint is a folder with what every command reads of a checkpoint: averaged
weights and the Gaussians of the seeds in float16 (`weights.safetensors`), and what
`checkpoint.save` calls `meta` with licence, command and figures (`model.json`). It has
no state to go on training from. `convert --export=zoo` makes one of a workdir.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import numpy as safetensors

from atebm_jax import checksums, storage
from atebm_jax.errors import UserError, check_choice
from atebm_jax.local_path import ZOO, LocalPath, in_zoo

WEIGHTS, META = "weights.safetensors", "model.json"

_SHIPPED = LocalPath(__file__).parent


def names() -> list[str]:
    """The models that are part of the package."""
    return sorted(path.parent.name for path in _SHIPPED.glob(f"*/{META}"))


def reached(path: str | epath.Path) -> epath.Path:
    """As `storage.reached`, of what is read; `zoo:NAME` is a folder of the package.

    Raises:
      UserError: also where the package has no model of that name.
    """
    if not in_zoo(path):
        return storage.reached(path)
    name = str(path).removeprefix(ZOO)
    check_choice("model of the zoo", name, names())
    return _SHIPPED / name


def is_light(folder: epath.Path) -> bool:
    """Whether a folder is a light checkpoint."""
    return (folder / WEIGHTS).exists() and (folder / META).exists()


def rounded(arrays: Any) -> Any:
    """Trees of float32 arrays in float16.

    Raises:
      UserError: a number is too large for it.
    """

    def half(path: tuple, array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            made = np.asarray(array, np.float16)
        if not np.isfinite(made).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"{name} has numbers beyond float16's {np.finfo(np.float16).max:g}: "
                "these weights cannot be exported as zoo; --export=safetensors can."
            )
        return made

    return jax.tree_util.tree_map_with_path(half, arrays)


def write(
    folder: epath.Path, arrays: Mapping[str, Any], meta: Mapping[str, Any]
) -> None:
    """Writes a light checkpoint into an empty folder.

    Args:
      folder: it.
      arrays: {"params": ..., "batch_stats": ..., "seeds": ...}, as of `rounded`.
      meta: plain JSON values.
    """
    flat = traverse_util.flatten_dict(dict(arrays), sep="/")
    (folder / WEIGHTS).write_bytes(safetensors.save(flat))
    storage.write_json(folder / META, meta)
    checksums.write(folder)


def read(folder: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """({"params": ..., "batch_stats": ...}, meta) as of `checkpoint.load_weights`.

    Raises:
      Exception: whatever the libraries raise of damaged files.
    """
    flat = safetensors.load((folder / WEIGHTS).read_bytes())
    wide = {name: np.asarray(array, np.float32) for name, array in flat.items()}
    tree = traverse_util.unflatten_dict(wide, sep="/")
    meta = read_meta(folder)
    if "seeds" in tree:
        meta["seeds"] = tree["seeds"]
    stats = tree.get("batch_stats", {})
    return {"params": tree["params"], "batch_stats": stats}, meta


def read_meta(folder: epath.Path) -> dict[str, Any]:
    """What `model.json` says."""
    return json.loads((folder / META).read_text())
