"""Images that a user names, brought to the shape of a network.

Named are files, folders and data sets (`digits:test`). Files are looked at as a viewer
shows them: turned as their EXIF entry says. Data sets pass through the config's
`data.preprocess`, as in the evaluation.
"""

import hashlib
import logging
import os
import re
import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from atebm_jax import data, names
from atebm_jax.data import decoding
from atebm_jax.errors import UserError
from atebm_jax.names import printable

_log = logging.getLogger(__name__)

# 32 bits a value, and no range that is known.
_MODES_WITHOUT_RANGE = ("I", "F")


# What Pillow raises for it: nearly anything.
_DAMAGED_EXIF = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError),
    *(SyntaxError, TypeError, ValueError, struct.error),
)


class Picture(NamedTuple):
    """An image that is named but not read yet.

    Attributes:
      name: of the files that are written for it.
      origin: its path, or its place in a data set.
      label: its class in a data set; None where there is none.
      read: (H, W, C) -> [H, W, C] uint8; raises UserError.
      path: of its file; None in a data set.
    """

    name: str
    origin: str
    label: int | None
    read: Callable[[tuple[int, ...]], np.ndarray]
    path: Path | None = None


def pictures(
    named: Sequence[str],
    index: str | None,
    config: Any,
    *,
    data_dir: str = "",
    resize: bool = False,
    class_names: Sequence[str] | None = None,
    by_place: bool = False,
) -> list[Picture]:
    """The images that the command line names.

    Args:
      named: paths of files or folders, or data sets.
      index: "0,5,10:20" or "all", of each folder and data set; None for all images of
        folders, and for none of a data set.
      config: complete config of the network.
      data_dir: where TFDS data sets lie; "" for the config's.
      resize: whether files of another size are brought to the network's.
      class_names: of the network, by number; None where it has none.
      by_place: class k of a data set is class k of the network.

    Raises:
      UserError: one is not there, or `index` does not fit.
    """
    found: list[Picture] = []
    for text in named:
        path = Path(os.path.expanduser(text))
        if text.startswith(data.KINDS):
            source = data.open_source(text, data_dir or config.data.data_dir)
            if source.num_classes == config.model.num_classes:
                source = data.relabel.follow(
                    source, class_names, text, by_place=by_place, note=_log.warning
                )
            found += _of_source(source, index, config)
        elif os.path.isdir(path):
            source = data.FolderSource(text)
            places = _places(index or "all", len(source), text)
            files = [Path(source.path(place)) for place in places]
            found += [_of_file(file, config, resize) for file in files]
        elif os.path.isfile(path):
            found.append(_of_file(path, config, resize))
        else:
            raise UserError(
                f"there is no image {text!r}: give files, folders or a data set such "
                "as digits:test."
            )
    return _with_unique_names(found)


def read_file(path: Path, shape: tuple[int, ...], config: Any, resize: bool) -> Any:
    """[H, W, C] uint8 of an image file.

    Colour becomes grey by its luminance, grey becomes RGB by repetition, 16 bits become
    8 by their upper half.

    Args:
      path: of the file.
      shape: (H, W, C) that is wanted.
      config: its `data.preprocess` serves where it leads to the shape.
      resize: bring other sizes to this one: by `data.preprocess` where there is one,
        otherwise scaled to cover it (bicubic, antialiased), then cut in the middle.

    Raises:
      UserError: no image, transparent, animated, or of another size without `resize`.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            opened = decoding.open_image(path.read_bytes())
            _check_readable(path, opened)
            deep = decoding.has_16_bits(opened)
            picture = _turned(opened)
            alpha = "A" in picture.getbands() or "transparency" in picture.info
            if alpha and np.asarray(picture.convert("RGBA"))[..., 3].min() < 255:
                raise UserError(
                    f"{path} has transparent pixels: the network knows none, flatten "
                    "it onto a background first."
                )
            array = data.decode(_bytes(picture, deep), shape[-1])
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


def _turned(opened: Image.Image) -> Image.Image:
    """An image as its EXIF entry says; as it is where that cannot be read."""
    try:
        return ImageOps.exif_transpose(opened)
    except _DAMAGED_EXIF:
        return opened


def _check_readable(path: Path, opened: Image.Image) -> None:
    # Telephones put a preview behind the image, as MPO.
    if getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO":
        raise UserError(f"{path} has several frames: give one of them as a file.")
    if opened.mode in _MODES_WITHOUT_RANGE and not decoding.has_16_bits(opened):
        raise UserError(
            f"{path} has 32 bits a value (mode {opened.mode}), whose range is not "
            "known: save it with 8 or 16 bits."
        )


def _bytes(picture: Image.Image, deep: bool) -> Any:
    """What `data.decode` takes, without a detour where nothing is to be converted."""
    if picture.mode in ("L", "RGB"):
        array = np.asarray(picture)
        return array[..., None] if array.ndim == 2 else array
    if deep:
        return decoding.high_bytes(picture)
    return np.asarray(picture.convert("RGB"))


def _resized(array: np.ndarray, shape: tuple[int, ...], config: Any) -> np.ndarray:
    whole = tuple(config.data.image_shape[:2])
    if config.data.preprocess and whole == tuple(shape[:2]):
        prepare = data.parse(config.data.preprocess)
        return prepare(array, np.random.default_rng(0))
    grey = array.shape[-1] == 1
    picture = Image.fromarray(array[..., 0] if grey else array)
    fitted = ImageOps.fit(
        picture, (shape[1], shape[0]), method=Image.Resampling.BICUBIC
    )
    result = np.asarray(fitted)
    return result[..., None] if grey else result


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} x {shape[0]}"


def _of_file(path: Path, config: Any, resize: bool) -> Picture:
    def read(shape: tuple[int, ...]) -> np.ndarray:
        return read_file(path, shape, config, resize)

    return Picture(names.for_files(path.stem), printable(str(path)), None, read, path)


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
        def read(shape: tuple[int, ...]) -> np.ndarray:
            origin = source.describe(place)
            made = images.make(place, np.random.default_rng(place))
            if made is None:
                raise UserError(f"{origin} cannot be decoded: leave it out.")
            image = made[0]
            if image.shape != tuple(shape):
                raise UserError(
                    f"{origin} has {_size(image.shape)} pixels and {_size(shape)} are "
                    "needed: give files of that size."
                )
            return image

        label = _label(source, place) if labelled else None
        return Picture(f"{prefix}_{place:06d}", source.describe(place), label, read)

    return [picture(place) for place in _places(index, len(source), spec)]


def _label(source: data.Source, place: int) -> int:
    try:
        return source[place]["label"]
    except data.content.UNREADABLE as error:
        raise UserError(
            f"{source.describe(place)} cannot be read ({error}): leave it out."
        ) from error


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
