"""What a release is: a folder with `model.safetensors` and `config.json`.

`model.safetensors` holds the averaged weights and, where seeds are drawn from
Gaussians, these. `config.json` holds what a checkpoint's `meta` does: stage, step, T,
config and names of the classes. Both are data: reading them runs nothing.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from types import UnionType
from typing import Any

import flax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from atebm_jax import config as configuration
from atebm_jax import fitting, models, storage
from atebm_jax.errors import UserError

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"

_LIBRARY = "atebm_jax"
# Of a checkpoint's `meta`, with their types; "seeds" are arrays.
_OF_META: dict[str, type | UnionType] = {
    "stage": str,
    "step": int,
    "T": int,
    "class_names": list | None,
    "config": dict,
}
_COLLECTIONS = ("params", "batch_stats", "seeds")
#: Half precision may be stored; everything is computed from float32.
DTYPES = ("float32", "float16")


def is_release(folder: epath.Path) -> bool:
    """Whether a folder has the two files of a release, whoever wrote them.

    A workdir has both where weights were exported into it, and `checkpoints` besides.
    """
    files = (folder / WEIGHTS).exists() and (folder / CONFIG).exists()
    return files and not (folder / "checkpoints").exists()


def write(
    folder: epath.Path,
    weights: Mapping[str, Any],
    meta: Mapping[str, Any],
    dtype: str = "float32",
) -> None:
    """Writes the two files.

    Args:
      folder: it is there.
      weights, meta: as `read` returns them.
      dtype: of the arrays in the file, one of `DTYPES`.

    Raises:
      UserError: a number is too large for the dtype.
    """
    tree = {**weights, "seeds": meta.get("seeds", {})}
    arrays = {name: _rounded(name, x, dtype) for name, x in flat(tree).items()}
    content = safetensors.save(arrays, metadata={"format": "flax"})
    storage.replace_bytes(folder / WEIGHTS, content)
    about = {name: meta.get(name) for name in _OF_META}
    header = {"library_name": _LIBRARY, "format": FORMAT, "sha256": _sha256(content)}
    storage.write_json(folder / CONFIG, header | about)


def _rounded(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        made = np.asarray(array, dtype, order="C")
    if (np.isinf(made) & np.isfinite(array)).any():
        raise UserError(
            f"{name} has numbers beyond {dtype}'s {np.finfo(dtype).max:g}: these "
            "weights cannot be released with it; --dtype=float32 can."
        )
    return made


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of nested dicts by their names in the file, "params/fc/bias"."""
    return flax.traverse_util.flatten_dict(dict(tree), sep="/")


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `flat`."""
    return flax.traverse_util.unflatten_dict(dict(leaves), sep="/")


def read(folder: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights of a release and its `meta`, as of `checkpoint.load_weights`.

    Raises:
      UserError: the folder is no release of this package, is damaged, or its weights
        do not fit its network.
    """
    meta = read_meta(folder)
    try:
        content = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise _damaged(folder, f"{WEIGHTS} cannot be read ({error})") from error
    if _sha256(content) != meta.pop("sha256"):
        raise _damaged(
            folder, f"the SHA-256 of {WEIGHTS} is not the one that {CONFIG} has"
        )
    tree = _arrays(folder, content)
    expected = _expected(folder, meta)
    if "seeds" in tree:
        meta["seeds"] = tree.pop("seeds")
        _check_seeds(folder, meta["seeds"], meta["config"])
    fitting.check_weights(expected, tree, os.fspath(folder))
    return {"params": {}, "batch_stats": {}} | tree, meta


def _check_seeds(folder: epath.Path, found: Any, config: Mapping[str, Any]) -> None:
    """Refuses Gaussians that no image of the config can be drawn from."""
    arrays = found if isinstance(found, dict) else {"": found}
    shapes = {name: np.shape(x) for name, x in arrays.items()}
    # np.shape calls a dict, arrays below a name, a single number.
    means, factors = (shapes.get(name, ()) for name in ("means", "factors"))
    *sides, channels = config["data"]["image_shape"]
    if (
        shapes.keys() != {"means", "factors"}
        or len(factors) != 5
        or 0 in factors
        or (factors[0], *factors[2:]) != means
        or means[0] not in (1, config["model"]["num_classes"])
        or means[3] != channels
        or any(a > b for a, b in zip(means[1:3], sides))
    ):
        raise _damaged(folder, f"{WEIGHTS} has seeds of shapes {shapes}")


def _expected(folder: epath.Path, meta: Mapping[str, Any]) -> Any:
    """Shapes of the variables of the network that a release describes."""
    config = ConfigDict(configuration.complete(meta["config"]))
    try:
        network = models.build(config.model)
        return models.variable_shapes(network, config.data.image_shape)
    except UserError:
        raise
    except Exception as error:  # values of the right type that make no sense
        raise _damaged(
            folder, f"{CONFIG} describes no network ({type(error).__name__})"
        ) from error


def _arrays(folder: epath.Path, content: bytes) -> dict[str, Any]:
    """The arrays of a file by collection, in float32."""
    try:
        arrays = safetensors.load(content)
    except (SafetensorError, KeyError) as error:  # the latter for an unknown dtype
        raise _damaged(folder, f"{WEIGHTS}: {error}") from error
    above = {
        name[:end] for name in arrays for end, sign in enumerate(name) if sign == "/"
    }
    for name, array in arrays.items():
        if name in above:
            raise _damaged(folder, f"{WEIGHTS} has {name!r} and arrays below it")
        if array.dtype.name not in DTYPES or name.split("/")[0] not in _COLLECTIONS:
            raise _damaged(
                folder,
                f"{WEIGHTS} has {name!r} of {array.dtype}; expected half or single "
                f"precision under {', '.join(_COLLECTIONS)}",
            )
    return nested({name: x.astype(np.float32) for name, x in arrays.items()})


def read_meta(folder: epath.Path) -> dict[str, Any]:
    """What `config.json` of a release says, checked; "sha256" is that of the weights.

    Raises:
      UserError: as of `read`.
    """
    try:
        about = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{CONFIG} cannot be read ({error})") from error
    if not isinstance(about, dict) or about.get("library_name") != _LIBRARY:
        raise UserError(
            f"{folder} is no release of {_LIBRARY}: {CONFIG} does not name it as "
            "library_name; PyTorch's weights are read by python -m atebm_jax.convert."
        )
    if about.get("format") != FORMAT:
        raise UserError(
            f"{folder} is a release of format {about.get('format')!r}: this version "
            f"reads format {FORMAT}."
        )
    wrong = [name for name in _OF_META if not _fits(about, name)]
    if wrong or not isinstance(about.get("sha256"), str):
        raise _damaged(folder, f"{CONFIG} has no usable {(*wrong, 'sha256')[0]}")
    try:
        config = ConfigDict(configuration.complete(about["config"]))
        configuration.check_complete(config)
        names, number = about["class_names"], config.model.num_classes
        if names is not None and len(names) != number:
            raise UserError(f"{len(names)} class_names for {number} classes")
    # Besides UserError what ConfigDict says of names that no field can have.
    except (ValueError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"{CONFIG}: {str(error).rstrip('.')}") from error
    return {name: about[name] for name in (*_OF_META, "sha256")}


def _fits(about: Mapping[str, Any], name: str) -> bool:
    return name in about and isinstance(about[name], _OF_META[name])


def _damaged(folder: epath.Path, reason: str) -> UserError:
    return UserError(
        f"the release in {folder} is damaged: {reason}; fetch it again, or make it "
        "anew with python -m atebm_jax.release."
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
