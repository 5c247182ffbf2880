"""Images that a user names, brought to the shape of a network.

Named are files, folders and data sets (`digits:test`). Files are looked at as a viewer
shows them: turned as their EXIF entry says. Data sets pass through the config's
`data.preprocess`, as in the evaluation.
"""

import argparse
import hashlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from atebm_jax import data, names
from atebm_jax.data import decoding
from atebm_jax.errors import UserError
from atebm_jax.names import printable
from atebm_jax.trained import Trained

_log = logging.getLogger(__name__)

# 32 bits a value, and no range that is known.
_MODES_WITHOUT_RANGE = ("I", "F")


class Picture(NamedTuple):
    """An image that is named but not read yet."""

    name: str  #: of the files that are written for it
    origin: str  #: its path, or its place in a data set
    label: int | None  #: its class in a data set; None where there is none
    #: (H, W, C) -> [H, W, C] uint8; raises UserError
    read: Callable[[tuple[int, ...]], np.ndarray]
    path: Path | None = None  #: of its file; None in a data set


def pictures(given: argparse.Namespace, loaded: Trained) -> list[Picture]:
    """The images that the flags of `edit` or `explain` name.

    Raises:
      UserError: one is not there, or --index does not fit.
    """
    config = loaded.config
    found: list[Picture] = []
    for text in given.images:
        path = Path(os.path.expanduser(text))
        if text.startswith(data.KINDS):
            source = data.open_source(text, given.data_dir or config.data.data_dir)
            if source.num_classes == loaded.num_classes:
                known = None if given.classes_by_place else loaded.class_names
                source = data.relabel.follow(source, known, text, note=_log.warning)
            found += _of_source(source, given.index, config)
            continue
        if os.path.isdir(path):
            source = data.FolderSource(text)
            places = _places(given.index or "all", len(source), text)
            files = [Path(source.path(place)) for place in places]
        elif os.path.isfile(path):
            files = [path]
        else:
            raise UserError(
                f"there is no image {text!r}: give files, folders or a data set such "
                "as digits:test."
            )
        for file in files:
            read = partial(read_file, file, config=config, resize=given.resize)
            found.append(Picture("", printable(str(file)), None, read, file))
    return _with_unique_names(found)


def read_file(path: Path, shape: tuple[int, ...], config: Any, resize: bool) -> Any:
    """[H, W, C] uint8 of an image file.

    Colour becomes grey by its luminance, grey becomes RGB by repetition, 16 bits become
    8 by their upper half. With `resize`, files of other sizes pass through the config's
    `data.preprocess`, or, without one, are scaled to cover the shape (bicubic,
    antialiased) and cut in the middle.

    Raises:
      UserError: no image, transparent, animated, or of another size without `resize`.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            array = data.decode(_levels(path), shape[-1])
    except (UserError, MemoryError):
        raise
    except Exception as error:  # broken files raise nearly anything in Pillow
        raise UserError(f"{path} cannot be read as an image: {error}.") from error
    if array.shape[:2] != shape[:2] and resize:
        try:
            array = _resized(array, shape, config)
        except decoding.BadImage as error:
            raise UserError(f"{path} cannot be resized: {error}.") from error
    if array.shape[:2] != shape[:2]:
        raise UserError(
            f"{path} has {_size(array.shape)} pixels and {_size(shape)} are needed: "
            "give an image of that size, or --resize to scale and cut it."
        )
    return array


def read_mask(path: Path, shape: tuple[int, ...], config: Any, resize: bool) -> Any:
    """[H, W] bool of a mask file, True (white, > 127) where pixels may change.

    Raises:
      UserError: as of `read_file`; a mask that is black everywhere.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no mask {str(path)!r}: give an image file.")
    mask = read_file(path, (*shape[:2], 1), config, resize)[..., 0] > 127
    if not mask.any():
        raise UserError(
            f"{path} is black everywhere: a mask is white where pixels may change."
        )
    return mask


def described(config: Any, resize: bool) -> dict[str, Any]:
    """The rule by which images came to the network's shape, for protocols."""
    prepared = config.data.preprocess or "scaled to cover, cut in the middle"
    return {
        "data_sets": config.data.preprocess or "as they are",
        "files": prepared if resize else "as they are",
    }


def fingerprint(image: np.ndarray) -> str:
    """SHA-256 of an image's values and shape."""
    described = f"{image.shape}{image.dtype}".encode()
    return hashlib.sha256(described + image.tobytes()).hexdigest()


def _levels(path: Path) -> np.ndarray:
    """Pixels of an image file as a viewer shows them, uint8: [H, W], [H, W, 1 or 3]."""
    opened = decoding.open_image(path.read_bytes())
    # Telephones put a preview behind the image, as MPO.
    if getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO":
        raise UserError(f"{path} has several frames: give one of them as a file.")
    deep = decoding.has_16_bits(opened)
    if opened.mode in _MODES_WITHOUT_RANGE and not deep:
        raise UserError(
            f"{path} has 32 bits a value (mode {opened.mode}), whose range is not "
            "known: save it with 8 or 16 bits."
        )
    picture = _turned(opened)
    alpha = "A" in picture.getbands() or "transparency" in picture.info
    if alpha and np.asarray(picture.convert("RGBA"))[..., 3].min() < 255:
        raise UserError(
            f"{path} has transparent pixels: the network knows none, flatten it onto "
            "a background first."
        )
    if deep:
        return decoding.high_bytes(picture)
    plain = picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
    return decoding.from_pillow(plain)


def _turned(opened: Image.Image) -> Image.Image:
    """An image as its EXIF entry says; as it is where that cannot be read."""
    try:
        return ImageOps.exif_transpose(opened)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  (a damaged entry raises nearly anything)
        return opened


def _resized(array: np.ndarray, shape: tuple[int, ...], config: Any) -> np.ndarray:
    height, width = shape[:2]
    if config.data.preprocess and tuple(config.data.image_shape[:2]) == (height, width):
        prepare = data.parse(config.data.preprocess)
        return prepare(array, np.random.default_rng(0))
    method = Image.Resampling.BICUBIC
    fitted = ImageOps.fit(decoding.to_pillow(array), (width, height), method=method)
    return decoding.from_pillow(fitted)


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} x {shape[0]}"


def _of_source(source: data.Source, index: str | None, config: Any) -> list[Picture]:
    settings, spec = config.data, source.spec
    if index is None:
        raise UserError(
            f"{spec} holds {len(source)} images: choose some, --index=0,5,10:20 say, "
            "or --index=all."
        )
    labelled = source.num_classes == config.model.num_classes
    operations = data.parse(settings.preprocess)
    images = data.Images(source, operations, tuple(settings.image_shape))
    prefix = names.for_files(re.sub(r"[^\w.-]+", "_", spec))

    def picture(place: int) -> Picture:
        origin = source.describe(place)

        def read(shape: tuple[int, ...]) -> np.ndarray:
            made = images.make(place, np.random.default_rng(place))
            if made is None:
                raise UserError(f"{origin} cannot be decoded: leave it out.")
            if made[0].shape != tuple(shape):
                raise UserError(
                    f"{origin} has {_size(made[0].shape)} pixels and {_size(shape)} "
                    "are needed: give files of that size."
                )
            return made[0]

        try:
            label = source[place]["label"] if labelled else None
        except data.content.UNREADABLE as error:
            raise UserError(
                f"{origin} cannot be read ({error}): leave it out."
            ) from error
        return Picture(f"{prefix}_{place:06d}", origin, label, read)

    return [picture(place) for place in _places(index, len(source), spec)]


def _places(index: str, length: int, what: str) -> list[int]:
    """Positions that `index` names, in its order, each once."""
    if index == "all":
        return list(range(length))
    places: list[int] = []
    for text in index.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+)\s*)?", text)
        first, last = (match[1], match[2]) if match else ("", None)
        run = range(int(first), int(last or int(first) + 1)) if match else range(0)
        if not run or run[-1] >= length:
            raise UserError(
                f"--index={index}: expected numbers from 0 to {length - 1} of the "
                f"images of {what}, such as 0,5 or 0:8 (without 8), or all."
            )
        places += run
    return list(dict.fromkeys(places))


def _with_unique_names(found: list[Picture]) -> list[Picture]:
    """File names without their ending, or with more of the path where two are alike."""
    ways: list[Callable[[Path], str]] = [
        lambda path: path.stem,
        lambda path: path.name,
        lambda path: "_".join(path.parts[-2:]),
        lambda path: "_".join(path.absolute().parts[1:]),
    ]
    for way in ways:
        made = [
            p.name if p.path is None else names.for_files(way(p.path)) for p in found
        ]
        if len(set(made)) == len(made):
            return [p._replace(name=n) for p, n in zip(found, made, strict=True)]
    raise UserError("an image is named twice: name each once.")
