"""A folder of samples: numbered PNG files, a grid, an `.npz`, the protocol."""

import contextlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atebm_jax import pictures, storage
from atebm_jax.data import decode
from atebm_jax.errors import UserError, shortened

_SHEET_IMAGES = 100


def claim(
    path: Path,
    protocol: Mapping[str, Any],
    *,
    free: Collection[str],
    keep: str,
    what: str,
    check: Callable[[Mapping[str, Any]], None] = lambda before: None,
) -> dict[str, Any]:
    """Writes the protocol, or refuses a folder with images of another one.

    Args:
      path: of the JSON file with the protocol; its folder is made.
      protocol: plain JSON.
      free: keys whose values may differ from those of the images that are there.
      keep: another key of the file, which stays as it is.
      what: lies in the folder, for messages.
      check: of what stands in the file, where images are there; raises `UserError`.

    Returns:
      What stands in the file now.

    Raises:
      UserError: other images are there, or it cannot be written.
    """
    folder = path.parent
    before: dict[str, Any] = {}
    with storage.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # A protocol alone is of a command that ended before its first image.
        if any(folder.glob("*.png")) or any(folder.glob("*.npz")):
            if not path.exists():
                raise UserError(
                    f"{folder} holds images of something else: give an empty --out."
                )
            before = _read_json(path)
            # As it reads after it was written: tuples become lists.
            for key, now in json.loads(json.dumps(protocol)).items():
                if key not in free and before.get(key) != now:
                    raise UserError(
                        f"{folder} holds {what} with {key} "
                        f"{shortened(before.get(key))} and now it is {shortened(now)}: "
                        "give another --out, or the same settings to go on."
                    )
            check(before)
        content = {**protocol, **{k: before[k] for k in before if k == keep}}
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


def told(out: Path) -> contextlib.AbstractContextManager[None]:
    """Says in one sentence that something cannot be written."""
    remedy = "Make room or give another --out; the same command goes on."
    return storage.writing(out, remedy)


def read_image(path: Path, image_shape: Sequence[int]) -> np.ndarray:
    """[H, W, C] uint8 of a PNG of that shape.

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
