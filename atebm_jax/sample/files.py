"""A folder of samples: numbered PNG files, a grid, an `.npz`, the protocol."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atebm_jax import pictures, storage
from atebm_jax.data import decode
from atebm_jax.errors import UserError

_SHEET_IMAGES = 100


def claim(
    folder: Path,
    protocol: Mapping[str, Any],
    clash: Sequence[str],
    *,
    name: str = "samples.json",
    what: str = "samples",
    keep: Sequence[str] = (),
    check: Callable[[Mapping[str, Any]], None] = lambda before: None,
) -> dict[str, Any]:
    """Makes the folder, or refuses one with images of another protocol.

    Args:
      folder: where images go.
      protocol: plain JSON, written beside them.
      clash: keys whose values must be those of the images that are there.
      name: of the file with the protocol.
      what: lies there, for messages.
      keep: other keys of that file, which stay as they are.
      check: is given what stands in that file, and raises if the folder's images do not
        go with those to come.

    Returns:
      What stands in the file now.

    Raises:
      UserError: other images are there, or it cannot be written.
    """
    path = folder / name
    before = None
    with storage.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # A protocol alone is of a command that ended before its first image.
        if any(folder.glob("*.png")) or any(folder.glob("*.npz")):
            if not path.exists():
                raise UserError(
                    f"{folder} holds images of something else: give an empty --out."
                )
            before = _read_json(path)
            _check_same(folder, before, protocol, clash, what)
            check(before)
        kept = {key: before[key] for key in keep if before and key in before}
        content = {**protocol, **kept}
        storage.write_json(path, content, allow_nan=False)
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        content = error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is damaged ({content}): it is not known what the images beside it "
            "are; give an empty --out."
        )
    return content


def _check_same(
    folder: Path,
    before: Mapping[str, Any],
    protocol: Mapping[str, Any],
    clash: Sequence[str],
    what: str,
) -> None:
    for key in clash:
        # As it reads after it was written: tuples become lists.
        now = json.loads(json.dumps(protocol[key]))
        if before.get(key) != now:
            raise UserError(
                f"{folder} holds {what} with {key} {_short(before.get(key))} and now "
                f"it is {_short(now)}: give another --out, or the same settings to go "
                "on."
            )


def _short(value: Any) -> str:
    """A value for a sentence: of a thousand classes the first ones."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:160]} ..."


def check_outside(out: Path, source: str | Path) -> None:
    """Refuses to write into a folder that is read: the next command would read it too.

    Args:
      out: where a command writes.
      source: a folder, `folder:PATH`; files and data sets are in no danger.

    Raises:
      UserError: `out` is the folder or lies in it.
    """
    folder = Path(os.path.expanduser(str(source).removeprefix("folder:")))
    # Of `os.path`: those of `Path` fail of loops of links and of names too long.
    inside = Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder))
    if os.path.isdir(folder) and inside:
        raise UserError(
            f"--out={out} lies in {folder}, whose images are read: give a folder "
            "outside of it."
        )


def told(out: Path) -> contextlib.AbstractContextManager[None]:
    """Says in one sentence that something cannot be written."""
    remedy = "Make room or give another --out; the same command goes on."
    return storage.writing(out, remedy)


def as_bytes(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] to the nearest of 256 levels, uint8."""
    return np.round(images * np.float32(255)).astype(np.uint8)


def image_path(folder: Path, index: int, label: int | None) -> Path:
    """`000012_class3.png`; without a class for unconditional samples."""
    return folder / (
        f"{index:06d}" + ("" if label is None else f"_class{label}") + ".png"
    )


def write_image(path: Path, image: np.ndarray) -> None:
    """Writes [H, W, C] uint8 as PNG, whole or not at all.

    Raises:
      UserError: the file cannot be written.
    """
    with told(path):
        storage.replace_bytes(path, pictures.png(image))


def read_image(path: Path, image_shape: Sequence[int]) -> np.ndarray:
    """[H, W, C] uint8 of a PNG that `write_image` wrote.

    Raises:
      UserError: it is damaged.
    """
    try:
        image = decode(path.read_bytes(), image_shape[-1])
        if image.shape != tuple(image_shape):
            raise ValueError(f"its shape is {image.shape}, not {tuple(image_shape)}")
        return image
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}): delete it, and the same command draws it "
            "again."
        ) from error


def finish(
    folder: Path,
    paths: Sequence[Path],
    labels: Sequence[int] | None,
    shape: Sequence[int],
) -> None:
    """Writes `grid.png` and `samples.npz` (arr_0 images, arr_1 classes).

    Raises:
      UserError: an image is damaged, or the folder cannot be written.
    """
    stacked = folder / ".samples.npy"
    whole = (len(paths), *shape)
    arrays = {} if labels is None else {"arr_1": np.asarray(labels, np.int64)}
    with told(folder):
        try:
            # On disk: all images need not fit into memory.
            images = np.lib.format.open_memmap(stacked, "w+", np.uint8, whole)
            for position, path in enumerate(paths):
                images[position] = read_image(path, shape)
            storage.write_npz(folder / "samples.npz", {"arr_0": images, **arrays})
            sheet = pictures.contact_sheet(np.asarray(images[:_SHEET_IMAGES]))
            storage.replace_bytes(folder / "grid.png", pictures.png(sheet))
        finally:
            stacked.unlink(missing_ok=True)
