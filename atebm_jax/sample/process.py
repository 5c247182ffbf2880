"""How the commands that edit go through images: resumable, in chunks, with a bar."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from atebm_jax import drawing, editing
from atebm_jax.errors import UserError
from atebm_jax.progress import track
from atebm_jax.sample import files, inputs, records
from atebm_jax.sample.inputs import Picture
from atebm_jax.trained import Trained
from atebm_jax.workdir_lock import held

# What may differ between two commands that write to one folder.
_FREE = ("checkpoint",)


class Item(NamedTuple):
    """A picture that has been read: image [H, W, C] uint8, and its SHA-256."""

    picture: Picture
    image: np.ndarray
    sha256: str


class Task(NamedTuple):
    """What is done with every picture.

    Attributes:
      shape: (H, W, C) that pictures are read in.
      variants: V, results of each picture.
      rows: (images [B, H, W, C] uint8, variants [B] in 0..V-1) -> rows to edit.
      recipe: how.
      write: (item, its V results) writes pictures; returns V records, plain JSON with
        the names of all files under "files".
      protocol: plain JSON, everything that decides the results.
      json: name of the file with protocol and records.
    """

    shape: tuple[int, ...]
    variants: int
    rows: Callable[[np.ndarray, np.ndarray], editing.Rows]
    recipe: editing.Recipe
    write: Callable[[Item, editing.Edited], list[dict[str, Any]]]
    protocol: dict[str, Any]
    json: str


def run(
    loaded: Trained,
    pictures: Sequence[Picture],
    task: Task,
    out: Path,
    console: Console,
) -> list[dict[str, Any]]:
    """Edits the pictures whose results are not in the folder yet.

    Returns:
      The records of all of `pictures`.

    Raises:
      UserError: a picture, the folder or the network's output cannot be used.
    """
    hashes = [
        inputs.fingerprint(picture.read(task.shape))
        for picture in track(pictures, "reading", console)
    ]
    # One command at a time: another one would gather what this one makes.
    with held(out, "--out"):
        return _into(loaded, pictures, hashes, task, out, console)


def _into(
    loaded: Trained,
    pictures: Sequence[Picture],
    hashes: Sequence[str],
    task: Task,
    out: Path,
    console: Console,
) -> list[dict[str, Any]]:
    """What `run` does once the folder is held; `hashes` are of the pictures."""
    clash = [key for key in task.protocol if key not in _FREE]
    content = files.claim(
        out, task.protocol, clash, name=task.json, keep=["results"], what="results"
    )
    done = records.finished(out, content)
    pending = [
        picture
        for picture, sha256 in zip(pictures, hashes, strict=True)
        if (picture.name, sha256) not in done
    ]
    for item, edited in _edited(loaded, pending, task, console):
        if not np.isfinite(edited.path.energy).all():
            raise UserError(
                f"the energies of {item.picture.origin} are not finite: the network "
                "has diverged, or --step_size is too large for it."
            )
        with files.told(out):
            records.write(out, item.picture.name, task.write(item, edited))
    wanted = {picture.name for picture in pictures}
    with files.told(out):
        results = records.gather(out, task.json, content)
    return [result for result in results if result["image"] in wanted]


def _edited(
    loaded: Trained, pending: Sequence[Picture], task: Task, console: Console
) -> Iterator[tuple[Item, editing.Edited]]:
    """(item, its results) of one picture after the other."""
    if not pending:
        return
    number, variants = len(pending) * task.variants, task.variants
    read: dict[int, Item] = {}
    made: dict[int, list[Any]] = {}

    def rows_of(indices: np.ndarray) -> editing.Rows:
        inside = np.minimum(indices, number - 1)
        places = (inside // variants).tolist()
        for place in dict.fromkeys(places):
            if place not in read:
                image = pending[place].read(task.shape)
                read[place] = Item(pending[place], image, inputs.fingerprint(image))
        images = np.stack([read[place].image for place in places])
        return task.rows(images, inside % variants)

    drawn = editing.edit_chunks(
        loaded.model, loaded.variables, rows_of, task.recipe, number
    )
    for indices, edited in track(drawn, "images", console, drawing.num_chunks(number)):
        for row, index in enumerate(indices):
            one = jax.tree.map(lambda array: array[row], edited)  # noqa: B023
            place = index // variants
            made.setdefault(place, []).append(one)
            if len(made[place]) == variants:
                together = jax.tree.map(lambda *a: np.stack(a), *made.pop(place))
                yield read.pop(place), together
