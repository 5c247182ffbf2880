"""Counterfactuals into a folder: `python -m atebm_jax.sample explain`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from atebm_jax import constraints, pictures, sampling
from atebm_jax.local_path import local
from atebm_jax.progress import say
from atebm_jax.sample import edits, files, inputs, loading, process, records
from atebm_jax.sample.process import Item

_JSON = "explain.json"


def run(given: argparse.Namespace, console: Console) -> None:
    """Explains the images that the flags name.

    Raises:
      UserError: a flag, the checkpoint, an image or the folder cannot be used.
    """
    loaded = loading.load(given)
    names = loading.class_names(loaded, given)
    targets = loading.parse_classes("--target", given.target, names).tolist()
    radii = loading.parse_radii(given.radius)
    asked = [(target, radius) for target in dict.fromkeys(targets) for radius in radii]
    out = Path(local("--out", given.out))
    for named in given.images:
        files.check_outside(out, named)

    def prepare(
        images: np.ndarray, variants: np.ndarray
    ) -> tuple[edits.Rows, edits.Recipe]:
        chosen = [asked[variant] for variant in variants]
        return edits.prepare(
            constraints.ball(images, [radius for _, radius in chosen], given.norm),
            np.asarray([target for target, _ in chosen], np.int32),
            loaded.config.evaluate.samples,
            step_size=given.step_size,
            num_steps=given.num_steps,
        )

    # All flags are looked at before an image is.
    black = np.zeros((len(asked), *loaded.image_shape), np.uint8)
    rows, recipe = prepare(black, np.arange(len(asked)))
    originals = inputs.pictures(
        given.images,
        given.index,
        loaded.config,
        data_dir=given.data_dir,
        resize=given.resize,
        class_names=loaded.class_names,
        by_place=given.classes_by_place,
    )
    task = process.Task(
        shape=loaded.image_shape,
        variants=len(asked),
        rows=lambda images, variants: prepare(images, variants)[0],
        recipe=recipe,
        write=lambda item, edited: _write(out, item, edited, asked, given.norm, names),
        protocol=loaded.described
        | {
            "asked": [
                {
                    "target": loading.named(target, names),
                    "radius": radius,
                    "norm": given.norm,
                    "step_size": records.reading(size),
                }
                for (target, radius), size in zip(asked, rows.step_sizes, strict=True)
            ],
            "sampler": recipe.sampler,
            "num_steps": recipe.num_steps,
            "inputs": inputs.described(loaded.config, given.resize),
            "note": "figures are of the results before they were rounded to bytes; "
            "paths have the start, then every step",
        },
        json=_JSON,
    )
    results = process.run(loaded, originals, task, out, console)
    reached = sum(result["reached"] for result in results)
    say(
        console,
        f"counterfactuals: {len(results)}, of images: {len(originals)}, in {out}; of "
        f"their target to the model: {reached}",
    )


def _write(
    out: Path,
    item: Item,
    edited: sampling.Edited,
    asked: Sequence[tuple[int, float]],
    norm: str,
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Pictures and records of one image's counterfactuals."""
    results, rows = [], []
    for number, (target, radius) in enumerate(asked):
        file = f"{item.picture.name}_target{target}_radius{radius:g}.png"
        files.write_image(out / file, files.as_bytes(edited.images[number]))
        later = number // pictures.ROWS
        strip = f"{item.picture.name}_strip{f'_{later + 1}' if later else ''}.png"
        result = records.of_image(item, edited, number, names)
        results.append(
            result
            | {
                "radius": radius,
                "norm": norm,
                "reached": result["predicted"]["class"] == target,
                "files": {"result": file, "strip": strip},
            }
        )
        rows.append(_row(edited, number, radius, norm, names))
    for first in range(0, len(rows), pictures.ROWS):
        strip = out / results[first]["files"]["strip"]
        part = rows[first : first + pictures.ROWS]
        pictures.strip(strip, item.picture.name, part)
    return results


def _row(
    edited: sampling.Edited, number: int, radius: float, norm: str, names: Sequence[str]
) -> pictures.Row:
    original, target = (
        names[classes[number]] for classes in (edited.originals, edited.targets)
    )
    path = edited.path
    before = float(path.original_confidence[number, 0])
    after = float(path.target_confidence[number, -1])
    curves = {f"p({target})": path.target_confidence[number]}
    if original != target:
        curves[f"p({original})"] = path.original_confidence[number]
    ball = f"{norm.capitalize()} radius {radius:g}"
    shown = {
        f"original\np({original}) = {before:.3g}": edited.start[number],
        f"as {target}, {ball}\np({target}) = {after:.3g}": edited.images[number],
    }
    change = edited.images[number] - edited.start[number]
    return pictures.Row(shown, change, curves, path.energy[number])
