"""What the commands write about models, images and results, as plain JSON.

Results of edits are kept image by image: those of each image are a hidden file, written
after its pictures, until the command ends and gathers all in one file. The next command
goes on from there, whenever this one was stopped.
"""

import importlib.metadata
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atebm_jax import storage
from atebm_jax.editing import Edited
from atebm_jax.errors import UserError
from atebm_jax.trained import Trained

_PARTS = ".results"

#: Name of an image -> its results.
Done = dict[str, Sequence[dict[str, Any]]]


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


def finished(folder: Path, content: Mapping[str, Any]) -> Done:
    """Results of images whose files are all there; a `UserError` if a part is damaged.

    `content` is that of the command's JSON file, with "results" from an earlier end.
    """
    done: dict[str, Any] = {}
    for result in content.get("results", []):
        done.setdefault(result["image"], []).append(result)
    for path in sorted((folder / _PARTS).glob("*.json")):
        try:
            part = json.loads(path.read_text())
            done[part[0]["image"]] = part
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{path} is damaged ({error}): delete it, and the same command makes "
                "its images again."
            ) from error
    return {
        image: found
        for image, found in done.items()
        if all((folder / name).exists() for r in found for name in r["files"].values())
    }


def write(folder: Path, results: Sequence[dict[str, Any]]) -> None:
    """Keeps the results of one image, whose pictures are there."""
    (folder / _PARTS).mkdir(exist_ok=True)
    path = folder / _PARTS / f"{results[0]['image']}.json"
    storage.write_json(path, results, allow_nan=False)


def gather(path: Path, content: Mapping[str, Any], done: Done) -> list[dict[str, Any]]:
    """Writes all results into the JSON file beside `content`, by name; returns them."""
    results = [result for image in sorted(done) for result in done[image]]
    storage.write_json(path, {**content, "results": results}, allow_nan=False)
    shutil.rmtree(path.parent / _PARTS, ignore_errors=True)
    return results


def of_edit(edited: Edited, names: Sequence[str]) -> dict[str, Any]:
    """What every result has: classes, confidences, energies, distance and path."""
    path, change = edited.path, edited.images - edited.start
    return {
        "original": named(edited.originals, names),
        "target": named(edited.targets, names),
        "predicted": named(path.predicted[-1], names),
        "original_confidence": _ends(path.original_confidence),
        "target_confidence": _ends(path.target_confidence),
        "energy": _ends(path.energy),
        "distance": {
            "l2": reading(np.linalg.norm(change)),
            "linf": reading(np.abs(change).max()),
        },
        "path": {
            name: values.tolist() if name == "predicted" else reading(values.tolist())
            for name, values in path._asdict().items()
        },
    }


def _ends(path: np.ndarray) -> dict[str, float]:
    return {"before": reading(path[0]), "after": reading(path[-1])}


def reading(values: Any) -> Any:
    """Numbers to six digits: more would be noise."""
    if isinstance(values, list | tuple):
        return [reading(value) for value in values]
    return float(f"{float(values):.6g}")
