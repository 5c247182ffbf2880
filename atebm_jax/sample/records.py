"""Finished results of the commands that edit, image by image, in one JSON file.

An image's results are a hidden file of their own, written after its pictures, until
the command ends and gathers all: stopped at any moment, the next one goes on.
"""

import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from atebm_jax import storage
from atebm_jax.editing import Edited
from atebm_jax.errors import UserError
from atebm_jax.trained import Trained

_PARTS = ".results"


def described(loaded: Trained, path: str) -> dict[str, Any]:
    """Which model it was, for protocols."""
    return {
        "checkpoint": str(path),
        "averaged_weights_sha256": loaded.fingerprint,
        "versions": {n: importlib.metadata.version(n) for n in ("atebm_jax", "jax")},
    }


def named(k: int, names: Sequence[str]) -> dict[str, Any]:
    """A class for JSON."""
    return {"class": int(k), "name": names[k]}


def finished(folder: Path, content: dict[str, Any]) -> dict[tuple, list[Any]]:
    """Results of images that are done: (name, sha256) -> its results.

    Args:
      folder: of the command.
      content: of its JSON file, with "results" from an earlier end.

    Raises:
      UserError: a part is damaged.
    """
    done: dict[tuple, list[Any]] = {}
    for result in content.get("results", []):
        done.setdefault(_identity(result), []).append(result)
    for path in sorted((folder / _PARTS).glob("*.json")):
        try:
            part = json.loads(path.read_text())
            done[_identity(part[0])] = part
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{path} is damaged ({error}): delete it, and the same command makes "
                "its images again."
            ) from error
    return {
        key: found
        for key, found in done.items()
        if all((folder / name).exists() for r in found for name in r["files"].values())
    }


def _identity(result: dict[str, Any]) -> tuple[str, str]:
    """An image by name and content: its file may have changed since."""
    return result["image"], result["sha256"]


def write(folder: Path, image: str, results: Sequence[Any]) -> None:
    """Says that an image is done; its pictures are there."""
    (folder / _PARTS).mkdir(exist_ok=True)
    path = folder / _PARTS / f"{image}.json"
    storage.write_json(path, list(results), allow_nan=False)


def gather(folder: Path, name: str, content: dict[str, Any]) -> list[Any]:
    """Writes all results into the JSON file, by name; returns them.

    Args:
      folder: of the command.
      name: of its JSON file.
      content: of that file, with results of earlier commands.
    """
    done = finished(folder, content)
    latest = {image: found for (image, _), found in done.items()}
    results = [result for image in sorted(latest) for result in latest[image]]
    whole = content | {"results": results}
    storage.write_json(folder / name, whole, allow_nan=False)
    shutil.rmtree(folder / _PARTS, ignore_errors=True)
    return results


def of_image(
    item: Any, edited: Edited, number: int, names: Sequence[str]
) -> dict[str, Any]:
    """What every record has: image, classes, confidences, energies, distance, path.

    Args:
      item: a `process.Item`.
      edited: results [V, ...] of the image.
      number: which of them.
      names: of the classes.
    """
    path = jax.tree.map(lambda array: array[number], edited.path)
    change = edited.images[number] - edited.start[number]
    label = item.picture.label
    return {
        "image": item.picture.name,
        "origin": item.picture.origin,
        "sha256": item.sha256,
        "label": None if label is None else named(label, names),
        "original": named(edited.originals[number], names),
        "target": named(edited.targets[number], names),
        "predicted": named(path.predicted[-1], names),
        "original_confidence": _ends(path.original_confidence),
        "target_confidence": _ends(path.target_confidence),
        "energy": _ends(path.energy),
        "distance": {
            "l2": reading(np.linalg.norm(change)),
            "linf": reading(np.abs(change).max()),
        },
        "path": {
            name: path_of.tolist() if name == "predicted" else reading(path_of.tolist())
            for name, path_of in path._asdict().items()
        },
    }


def _ends(path: np.ndarray) -> dict[str, float]:
    return {"before": reading(path[0]), "after": reading(path[-1])}


def reading(values: Any) -> Any:
    """Numbers to six digits: more would be noise."""
    if isinstance(values, list | tuple):
        return [reading(value) for value in values]
    return float(f"{float(values):.6g}")
