"""Edits into a folder: `python -m atebm_jax.sample edit`, and `explain`.

Images are edited in chunks. A command that was stopped goes on with those that have no
results yet.
"""

import argparse
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from atebm_jax import drawing, editing, pictures, recipes, storage, trained
from atebm_jax.data.folder import check_outside
from atebm_jax.editing import Edited
from atebm_jax.errors import UserError
from atebm_jax.local_path import local
from atebm_jax.progress import say, track
from atebm_jax.sample import asked, files, inputs, records, tasks
from atebm_jax.sample.inputs import Picture
from atebm_jax.sample.tasks import Problem
from atebm_jax.trained import Trained
from atebm_jax.workdir_lock import held

_NOTE = (
    "figures are of the results before they were rounded to bytes; paths have the "
    "start, then every step; psnr in decibels, null where an image is its truth"
)


def run(command: str, given: argparse.Namespace, console: Console) -> None:
    """Edits or explains, by the command's name, the images that the flags name.

    Raises:
      UserError: a flag, the checkpoint, an image or the folder cannot be used.
    """
    loaded = trained.load(given.workdir, best_by=given.best_by)
    names = asked.class_names(loaded, given)
    make = {"edit": tasks.edit, "explain": tasks.explanation}[command]
    problem = make(given, loaded, names)
    out = Path(local("--out", given.out))
    for named in given.images:
        check_outside("--out", out, named)
    # All flags are looked at before an image is.
    variants = np.arange(len(problem.files))
    black = np.zeros((len(variants), *problem.shape), np.uint8)
    rows, recipe = problem.rows(black, variants)
    found = inputs.pictures(given, loaded)
    truths = tasks.references(given, found, loaded) if command == "edit" else {}
    sizes = records.reading(rows.step_sizes.tolist())
    protocol = {
        **records.described(loaded, given.workdir),
        **problem.settings,
        "norm": given.norm,
        "sampler": recipe.sampler,
        "schedule": recipe.schedule,
        "step_size": sizes[0] if len(sizes) == 1 else sizes,
        "num_steps": recipe.num_steps,
        "seed": recipe.seed,
        "references": {name: inputs.fingerprint(x) for name, x in truths.items()},
        "inputs": inputs.described(loaded.config, given.resize),
        "note": _NOTE,
    }
    path = out / f"{command}.json"
    results = _results(loaded, problem, recipe, found, truths, protocol, path, console)
    say(console, f"{len(results)} images are in {out}{tasks.summary(results)}")


def _results(
    loaded: Trained,
    problem: Problem,
    recipe: recipes.Recipe,
    found: Sequence[Picture],
    truths: Mapping[str, np.ndarray],
    protocol: dict[str, Any],
    path: Path,
    console: Console,
) -> list[dict[str, Any]]:
    """Edits the pictures that have no results yet; the results of all of them."""
    hashes = [
        inputs.fingerprint(picture.read(problem.shape))
        for picture in track(found, "reading", console)
    ]
    out = path.parent
    # One command at a time: another one would gather what this one makes.
    with held(out, "--out"):
        content = files.claim(
            path, protocol, free=("checkpoint",), keep="results", what="results"
        )
        done = records.finished(out, content)
        pending = [
            picture
            for picture, sha256 in zip(found, hashes, strict=True)
            # The file may have changed since.
            if picture.name not in done or done[picture.name][0]["sha256"] != sha256
        ]
        edits = _edited(loaded, problem, recipe, pending, console)
        for picture, image, edited in edits:
            truth = truths.get(picture.name)
            with files.told(out):
                results = _write(out, problem, picture, image, edited, truth)
                records.write(out, results)
            done[picture.name] = results
        with files.told(out):
            results = records.gather(path, content, done)
    wanted = {picture.name for picture in found}
    return [result for result in results if result["image"] in wanted]


def _edited(
    loaded: Trained,
    problem: Problem,
    recipe: recipes.Recipe,
    pending: Sequence[Picture],
    console: Console,
) -> Iterator[tuple[Picture, np.ndarray, list[Edited]]]:
    """(picture, its image [H, W, C] uint8, its V results), one after the other."""
    variants = len(problem.files)
    number = len(pending) * variants
    read: dict[int, np.ndarray] = {}
    made: list[Edited] = []

    def rows_of(indices: np.ndarray) -> editing.Rows:
        inside = np.minimum(indices, number - 1)
        places = (inside // variants).tolist()
        for place in places:
            if place not in read:
                read[place] = pending[place].read(problem.shape)
        images = np.stack([read[place] for place in places])
        return problem.rows(images, inside % variants)[0]

    if not pending:
        return
    chunks = editing.edit_chunks(
        loaded.model, loaded.variables, rows_of, recipe, number
    )
    for indices, edited in track(chunks, "images", console, drawing.num_chunks(number)):
        for row, index in enumerate(indices):
            made.append(jax.tree.map(operator.itemgetter(row), edited))
            if len(made) == variants:
                place = index // variants
                yield pending[place], read.pop(place), made
                made = []


def _write(
    out: Path,
    problem: Problem,
    picture: Picture,
    image: np.ndarray,
    edited: Sequence[Edited],
    truth: np.ndarray | None,
) -> list[dict[str, Any]]:
    """Writes the pictures of one image's variants; returns their records."""
    if not all(np.isfinite(one.path.energy).all() for one in edited):
        raise UserError(
            f"the energies of {picture.origin} are not finite: the network has "
            "diverged, or --step_size is too large for it."
        )
    names, label = problem.names, picture.label
    described = {
        "image": picture.name,
        "origin": picture.origin,
        "sha256": inputs.fingerprint(image),
        "label": None if label is None else records.named(label, names),
    }
    results, rows = [], []
    for number, (part, one) in enumerate(zip(problem.files, edited, strict=True)):
        shown, more = problem.compare(number, one, image, truth)
        file = f"{picture.name}_{part}.png"
        levels = np.asarray(recipes.QUANTISE["nearest"](one.images))
        storage.replace_bytes(out / file, pictures.png(levels))
        later = number // pictures.ROWS
        strip = f"{picture.name}_strip{f'_{later + 1}' if later else ''}.png"
        record = described | records.of_edit(one, names) | more
        results.append(record | {"files": {"result": file, "strip": strip}})
        rows.append(_row(one, shown, problem))
    for first in range(0, len(rows), pictures.ROWS):
        strip = out / results[first]["files"]["strip"]
        pictures.strip(strip, picture.name, rows[first : first + pictures.ROWS])
    return results


def _row(
    edited: Edited, shown: Mapping[str, np.ndarray], problem: Problem
) -> pictures.Row:
    """One row of a strip: pictures, what changed, and the way there."""
    path = edited.path
    original, target = (problem.names[k] for k in (edited.originals, edited.targets))
    curves = {f"p({target})": path.target_confidence}
    if original != target:
        curves[f"p({original})"] = path.original_confidence
    change = edited.images - edited.start
    return pictures.Row(shown, change, curves, path.energy, problem.hole)
