"""Augmentations of uint8 images, written as one string.

    pad_crop(4)|flip|autoaugment_cifar10|cutout(16)

Every operation maps (image [H, W, C] uint8, rng) to an image [H', W', C] uint8. It
leaves its input unchanged and takes all of its randomness from `rng`.
"""

import functools
import math
import re
from collections.abc import Callable

import numpy as np

from atebm_jax import calls
from atebm_jax.data.autoaugment import autoaugment_cifar10
from atebm_jax.data.decoding import BadImage, scaled
from atebm_jax.errors import UserError, check_choice

Augmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]

_FILTERS = ("bilinear", "bicubic")


# --- Crops, flips, sizes --------------------------------------------------------------


def pad_crop(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Pads every side with `size` black pixels, then crops the old size at random."""
    height, width, channels = image.shape
    top, left = rng.integers(0, 2 * size + 1, size=2)
    padded = np.zeros((height + 2 * size, width + 2 * size, channels), np.uint8)
    padded[size : size + height, size : size + width] = image
    return padded[top : top + height, left : left + width]


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors left and right with probability 1/2."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def cutout(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Blackens a square of `size` pixels around a random pixel (arXiv:1708.04552)."""
    y, x = rng.integers(0, image.shape[:2])
    return cutout_at(image, int(y), int(x), size)


def cutout_at(image: np.ndarray, y: int, x: int, size: int) -> np.ndarray:
    """Blackens rows y - size//2 to y - size//2 + size - 1, clipped; columns alike."""
    top, left = y - size // 2, x - size // 2
    out = image.copy()
    out[max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
    return out


def resize(
    image: np.ndarray,
    rng: np.random.Generator | None,
    size: int,
    interpolation: str = "bilinear",
    crop: int | None = None,
) -> np.ndarray:
    """Scales the shorter side to `size` pixels, antialiased; the longer is floored.

    With `crop`, `center_crop(crop)` follows. A thin image would take gigabytes: of it
    Pillow scales only what the crop keeps, which is the same to rounding.

    Raises:
      BadImage: without `crop`, the image would take gigabytes.
    """
    before = image.shape[:2]
    height, width = size, int(size * before[1] / before[0])
    if before[0] > before[1]:
        height, width = int(size * before[0] / before[1]), size
    if (height, width) == before or height * width <= _room(size):
        whole = image
        if (height, width) != before:
            whole = scaled(image, height, width, interpolation)
        return whole if crop is None else center_crop(whole, rng, crop)
    if crop is None:
        raise BadImage(
            f"{before[1]} x {before[0]} pixels would become {width} x {height}; only "
            "a center_crop that follows at once makes less of it"
        )
    top, left = _margin(height, crop), _margin(width, crop)
    rows, columns = min(crop, height), min(crop, width)
    down, across = before[0] / height, before[1] / width
    box = (left * across, top * down, (left + columns) * across, (top + rows) * down)
    return scaled(image, rows, columns, interpolation, box)


def _room(size: int) -> int:
    """The most pixels that a resized image may have."""
    return max(4 * size**2, 2**24)


def center_crop(
    image: np.ndarray, rng: np.random.Generator | None, size: int
) -> np.ndarray:
    """Cuts the middle `size` by `size` pixels; a side that is shorter stays whole."""
    top, left = (_margin(length, size) for length in image.shape[:2])
    return image[top : top + size, left : left + size]


def _margin(length: int, size: int) -> int:
    """Where `size` pixels in the middle of `length` begin."""
    return max(round((length - size) / 2), 0)


def random_resized_crop(
    image: np.ndarray, rng: np.random.Generator, size: int
) -> np.ndarray:
    """A crop of random area and aspect, scaled to `size` by `size`, antialiased.

    The area is uniform in 8 % to 100 % of the image, the aspect log-uniform in 3/4 to
    4/3. After ten misses: the largest central crop with an aspect in that range.
    """
    top, left, height, width = _random_box(image.shape[0], image.shape[1], rng)
    crop = image[top : top + height, left : left + width]
    return scaled(crop, size, size, "bilinear")


def _random_box(
    height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop, all in pixels."""
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(0, height - crop_height + 1))
            left = int(rng.integers(0, width - crop_width + 1))
            return top, left, crop_height, crop_width
    aspect = min(max(width / height, 3 / 4), 4 / 3)
    crop_width = min(width, max(round(height * aspect), 1))
    crop_height = min(height, max(round(width / aspect), 1))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return top, left, crop_height, crop_width


# --- The string -----------------------------------------------------------------------

# Name -> the operation, and an example; the `size`, if any, stands in parentheses.
OPS: dict[str, tuple[Callable[..., np.ndarray], str]] = {
    "pad_crop": (pad_crop, "pad_crop(4)"),
    "flip": (flip, "flip"),
    "autoaugment_cifar10": (autoaugment_cifar10, "autoaugment_cifar10"),
    "cutout": (cutout, "cutout(16)"),
    "random_resized_crop": (random_resized_crop, "random_resized_crop(256)"),
    "resize": (resize, "resize(256) or resize(256,bicubic)"),
    "center_crop": (center_crop, "center_crop(256)"),
}

# Pixels of a size; more is a slip, and would take gigabytes per image.
_LARGEST = 8192
_SIZE = re.compile(r"[1-9][0-9]{0,4}")


def parse(spec: str) -> Augmentation:
    """Reads a pipeline such as `"pad_crop(4)|flip"`; applied from left to right.

    The result can be pickled. The empty string changes nothing.

    Raises:
      UserError: an unknown operation or a wrong argument.
    """
    operations: list[functools.partial] = []
    for text in spec.split("|") if spec.strip() else []:
        call = _parse_call(text, spec)
        last = operations[-1] if operations else call
        follows = (last.func, call.func) == (resize, center_crop)
        if follows and "crop" not in last.keywords:
            # A resize does the crop that follows it.
            call = functools.partial(operations.pop(), crop=call.keywords["size"])
        operations.append(call)
    return functools.partial(_apply, tuple(operations))


def _apply(
    operations: tuple[Augmentation, ...], image: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    for operation in operations:
        image = operation(image, rng)
    return image


def _parse_call(call: str, spec: str) -> functools.partial:
    name, words = calls.read(call) or (call.strip(), [])
    if name not in OPS:
        known = [x for _, example in OPS.values() for x in example.split(" or ")]
        of = f" in {spec!r}, operations joined by |"
        check_choice("augmentation", call.strip(), known, of)
    function, example = OPS[name]
    takes_size = "(" in example
    keywords: dict[str, int | str] = {}
    if takes_size and words and _SIZE.fullmatch(words[0]) and int(words[0]) <= _LARGEST:
        keywords["size"] = int(words.pop(0))
    if keywords and function is resize and words and words[0] in _FILTERS:
        keywords["interpolation"] = words.pop(0)
    if words or bool(keywords) != takes_size:
        pixels = f", with a whole number of pixels, 1 to {_LARGEST}" * takes_size
        raise UserError(
            f"wrong arguments of the augmentation {call.strip()!r} in {spec!r}: write "
            f"{example}{pixels}"
        )
    return functools.partial(function, **keywords)
