"""Augmentations of uint8 images, written as one string.

    pad_crop(4)|flip|autoaugment_cifar10|cutout(16)

Every operation maps (image [H, W, C] uint8, rng) to an image [H', W', C] uint8, leaves
its input unchanged and takes all of its randomness from `rng`.
"""

import difflib
import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from atebm_jax import calls
from atebm_jax.data.autoaugment import autoaugment_cifar10
from atebm_jax.data.decoding import BadImage, from_pillow, to_pillow
from atebm_jax.errors import UserError, check_choice

Augmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


# --- Crops, flips, sizes --------------------------------------------------------------


def pad_crop(image: np.ndarray, rng: np.random.Generator, pad: int) -> np.ndarray:
    """Pads every side with `pad` black pixels, crops the old size at random."""
    height, width, channels = image.shape
    top, left = rng.integers(0, 2 * pad + 1, size=2)
    padded = np.zeros((height + 2 * pad, width + 2 * pad, channels), np.uint8)
    padded[pad : pad + height, pad : pad + width] = image
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
) -> np.ndarray:
    """Scales the shorter side to `size` pixels, antialiased; the longer is floored.

    Raises:
      BadImage: the longer side would be so long that the image takes gigabytes.
    """
    height, width = _resized_shape(image, size)
    if (height, width) == image.shape[:2]:
        return image
    if height * width > _room(size):
        raise BadImage(
            f"{image.shape[1]} x {image.shape[0]} pixels would become {width} x "
            f"{height}; only a center_crop that follows at once makes less of it"
        )
    return _scale(image, height, width, interpolation)


def _resized_shape(image: np.ndarray, size: int) -> tuple[int, int]:
    height, width = image.shape[:2]
    if min(height, width) == size:
        return height, width
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def _room(size: int) -> int:
    """The most pixels of a resized image, from the size that is asked for."""
    return max(4 * size**2, 2**24)


def center_crop(
    image: np.ndarray, rng: np.random.Generator | None, size: int
) -> np.ndarray:
    """Cuts the middle `size` by `size` pixels; a side that is shorter stays whole."""
    height, width = image.shape[:2]
    top = max(round((height - size) / 2), 0)
    left = max(round((width - size) / 2), 0)
    return image[top : top + size, left : left + size]


def resize_and_center_crop(
    image: np.ndarray,
    rng: np.random.Generator | None,
    size: int,
    crop: int,
    interpolation: str = "bilinear",
) -> np.ndarray:
    """`resize(size)`, then `center_crop(crop)`; of thin images nothing but the middle.

    A line of pixels, scaled to a shorter side of 256, is an image of gigabytes. The
    crop keeps its middle. So Pillow makes only that, which is the same to rounding.
    """
    height, width = _resized_shape(image, size)
    if height * width <= _room(size):
        return center_crop(resize(image, rng, size, interpolation), rng, crop)
    top, left = max(round((height - crop) / 2), 0), max(round((width - crop) / 2), 0)
    rows, columns = min(crop, height), min(crop, width)
    down, across = image.shape[0] / height, image.shape[1] / width
    box = (left * across, top * down, (left + columns) * across, (top + rows) * down)
    return _scale(image, rows, columns, interpolation, box)


def random_resized_crop(
    image: np.ndarray, rng: np.random.Generator, size: int
) -> np.ndarray:
    """A crop of random area and aspect, scaled to `size` by `size`, antialiased.

    The area is uniform in 8 % to 100 % of the image, the aspect log-uniform in 3/4 to
    4/3. After ten misses: the largest central crop with an aspect in that range.
    """
    top, left, height, width = _random_box(image.shape[0], image.shape[1], rng)
    crop = image[top : top + height, left : left + width]
    return _scale(crop, size, size, "bilinear")


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


def _scale(
    image: np.ndarray,
    height: int,
    width: int,
    interpolation: str,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Scales an image, or what lies in a box of it: left, top, right, bottom."""
    scaled = to_pillow(image).resize((width, height), _FILTERS[interpolation], box)
    return from_pillow(scaled)


# --- The string -----------------------------------------------------------------------


class Op(NamedTuple):
    """An operation that may be written in the string.

    size_name: the parameter that its whole number sets, if it takes one.
    interpolations: what may follow the number.
    """

    function: Callable[..., np.ndarray]
    example: str
    size_name: str = ""
    interpolations: tuple[str, ...] = ()


OPS: dict[str, Op] = {
    "pad_crop": Op(pad_crop, "pad_crop(4)", "pad"),
    "flip": Op(flip, "flip"),
    "autoaugment_cifar10": Op(autoaugment_cifar10, "autoaugment_cifar10"),
    "cutout": Op(cutout, "cutout(16)", "size"),
    "random_resized_crop": Op(random_resized_crop, "random_resized_crop(256)", "size"),
    "resize": Op(resize, "resize(256) or resize(256,bicubic)", "size", tuple(_FILTERS)),
    "center_crop": Op(center_crop, "center_crop(256)", "size"),
}

# Pixels; more is a slip, and would take gigabytes an image.
_LARGEST = 8192
_SIZE = re.compile(r"[1-9][0-9]{0,4}")


def parse(spec: str) -> Augmentation:
    """Reads a pipeline such as `"pad_crop(4)|flip"`; applied from left to right.

    The result can be pickled. The empty string changes nothing.

    Raises:
      UserError: an unknown operation or a wrong argument.
    """
    texts = spec.split("|") if spec.strip() else []
    operations = [_parse_call(call, spec) for call in texts]
    return functools.partial(_apply, tuple(_joined(operations)))


def _joined(operations: list[functools.partial]) -> list[functools.partial]:
    """The same operations; a resize and the crop that follows it become one."""
    joined: list[functools.partial] = []
    for call in operations:
        if call.func is center_crop and joined and joined[-1].func is resize:
            settings = joined.pop().keywords | {"crop": call.keywords["size"]}
            call = functools.partial(resize_and_center_crop, **settings)
        joined.append(call)
    return joined


def _apply(
    operations: tuple[Augmentation, ...], image: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    for operation in operations:
        image = operation(image, rng)
    return image


def _parse_call(call: str, spec: str) -> functools.partial:
    name, words = calls.read(call) or (call.strip(), [])
    if name not in OPS:
        near = difflib.get_close_matches(name, OPS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        known = [op.example for op in OPS.values()]
        of = f" in {spec!r}, operations joined by |{hint}"
        check_choice("augmentation", call.strip(), known, of)
    op = OPS[name]
    keywords: dict[str, int | str] = {}
    if op.size_name and words and _is_size(words[0]):
        keywords[op.size_name] = int(words.pop(0))
    if keywords and words and words[0] in op.interpolations:
        keywords["interpolation"] = words.pop(0)
    if words or bool(keywords) != bool(op.size_name):
        raise UserError(
            f"wrong arguments of the augmentation {call.strip()!r} in {spec!r}: write "
            f"{op.example}"
            + (f", with a whole number of pixels, 1 to {_LARGEST}" * bool(op.size_name))
        )
    return functools.partial(op.function, **keywords)


def _is_size(word: str) -> bool:
    return _SIZE.fullmatch(word) is not None and int(word) <= _LARGEST
