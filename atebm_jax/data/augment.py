"""Augmentations of uint8 images, written as one string.

    pad_crop(4)|flip|autoaugment_cifar10|cutout(16)

Every operation maps (image [H, W, C] uint8, rng) to an image [H', W', C] uint8, leaves
its input unchanged and takes all of its randomness from `rng`.
"""

import difflib
import functools
import io
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from atebm_jax.errors import UserError

Augmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


# --- Decoding -------------------------------------------------------------------------


def decode(image: bytes | np.ndarray, channels: int) -> np.ndarray:
    """Decodes an image file, or converts an array, to `channels` channels.

    The EXIF orientation is ignored, as the usual ImageNet pipelines do. Transparency
    is dropped; of an animation the first frame is taken.

    Args:
      image: an encoded image, or uint8 [H, W], [H, W, 1] or [H, W, 3].
      channels: 1 (grey) or 3 (RGB).

    Returns:
      [H, W, channels] uint8.

    Raises:
      ValueError: the image is truncated, broken, or not an image.
    """
    if channels not in (1, 3):
        raise UserError(f"images have 1 or 3 channels, got {channels}")
    if isinstance(image, np.ndarray):
        if image.ndim == 3 and image.shape[2] == channels:
            return image
        opened = _to_pillow(image)
    else:
        opened = _open(image)
    mode = "L" if channels == 1 else "RGB"
    return _from_pillow(opened if opened.mode == mode else _convert(opened, mode))


def _open(encoded: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(encoded))
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # broken files raise nearly anything in Pillow
        raise ValueError(f"cannot decode the image: {error}") from error
    return image


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip at 255, not scale
        high_byte = np.asarray(image).astype(np.uint16) >> 8
        image = Image.fromarray(high_byte.astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def _to_pillow(image: np.ndarray) -> Image.Image:
    grey = image.ndim == 3 and image.shape[2] == 1
    return Image.fromarray(image[:, :, 0] if grey else image)


def _from_pillow(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


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
    """Scales the shorter side to `size` pixels, antialiased; the longer is floored."""
    height, width = image.shape[:2]
    if min(height, width) == size:
        return image
    if height <= width:
        height, width = size, int(size * width / height)
    else:
        height, width = int(size * height / width), size
    return _scale(image, height, width, interpolation)


def center_crop(
    image: np.ndarray, rng: np.random.Generator | None, size: int
) -> np.ndarray:
    """Cuts the middle `size` by `size` pixels; a side that is shorter stays whole."""
    height, width = image.shape[:2]
    top = max(round((height - size) / 2), 0)
    left = max(round((width - size) / 2), 0)
    return image[top : top + size, left : left + size]


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
    return (
        (height - crop_height) // 2,
        (width - crop_width) // 2,
        crop_height,
        crop_width,
    )


def _scale(
    image: np.ndarray, height: int, width: int, interpolation: str
) -> np.ndarray:
    scaled = _to_pillow(image).resize((width, height), _FILTERS[interpolation])
    return _from_pillow(scaled)


# --- AutoAugment, CIFAR-10 policy (arXiv:1805.09501, appendix) ------------------------


class Step(NamedTuple):
    """One operation of a sub-policy; magnitude_index: 0..9."""

    name: str
    probability: float
    magnitude_index: int


CIFAR10_POLICY: tuple[tuple[Step, Step], ...] = tuple(
    (Step(*first), Step(*second))
    for first, second in (
        (("invert", 0.1, 7), ("contrast", 0.2, 6)),
        (("rotate", 0.7, 2), ("translateX", 0.3, 9)),
        (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
        (("shearY", 0.5, 8), ("translateY", 0.7, 9)),
        (("autocontrast", 0.5, 8), ("equalize", 0.9, 2)),
        (("shearY", 0.2, 7), ("posterize", 0.3, 7)),
        (("color", 0.4, 3), ("brightness", 0.6, 7)),
        (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
        (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
        (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
        (("color", 0.7, 7), ("translateX", 0.5, 8)),
        (("equalize", 0.3, 7), ("autocontrast", 0.4, 8)),
        (("translateY", 0.4, 3), ("sharpness", 0.2, 6)),
        (("brightness", 0.9, 6), ("color", 0.2, 8)),
        (("solarize", 0.5, 2), ("invert", 0.0, 3)),
        (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
        (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
        (("color", 0.9, 9), ("equalize", 0.6, 6)),
        (("autocontrast", 0.8, 4), ("solarize", 0.2, 8)),
        (("brightness", 0.1, 3), ("color", 0.7, 0)),
        (("solarize", 0.4, 5), ("autocontrast", 0.9, 3)),
        (("translateY", 0.9, 9), ("translateY", 0.7, 9)),
        (("autocontrast", 0.9, 2), ("solarize", 0.8, 3)),
        (("equalize", 0.8, 8), ("invert", 0.1, 3)),
        (("translateY", 0.7, 9), ("autocontrast", 0.9, 1)),
    )
)

_UNUSED = np.zeros(10)

# Strength by magnitude index; for shear and translation a fraction of the width,
# for rotation degrees, for posterising the bits kept, for solarising a grey level.
MAGNITUDES: dict[str, np.ndarray] = {
    "shearX": np.linspace(0, 0.3, 10),
    "shearY": np.linspace(0, 0.3, 10),
    "translateX": np.linspace(0, 150 / 331, 10),
    "translateY": np.linspace(0, 150 / 331, 10),
    "rotate": np.linspace(0, 30, 10),
    "color": np.linspace(0, 0.9, 10),
    "contrast": np.linspace(0, 0.9, 10),
    "sharpness": np.linspace(0, 0.9, 10),
    "brightness": np.linspace(0, 0.9, 10),
    "posterize": np.round(np.linspace(8, 4, 10)),
    "solarize": np.linspace(256, 0, 10),
    "autocontrast": _UNUSED,
    "equalize": _UNUSED,
    "invert": _UNUSED,
}


def _affine(
    image: Image.Image,
    matrix: tuple[float, ...],
    filter_: Image.Resampling,
    fill: int,
) -> Image.Image:
    # The matrix takes output pixels to input pixels.
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        filter_,
        fillcolor=_grey(image, fill),
    )


def _grey(image: Image.Image, level: int) -> int | tuple[int, ...]:
    return level if image.mode == "L" else (level,) * 3


def _shear_x(image: Image.Image, amount: float, fill: int) -> Image.Image:
    return _affine(image, (1, amount, 0, 0, 1, 0), Image.Resampling.BICUBIC, fill)


def _shear_y(image: Image.Image, amount: float, fill: int) -> Image.Image:
    return _affine(image, (1, 0, 0, amount, 1, 0), Image.Resampling.BICUBIC, fill)


def _translate_x(image: Image.Image, amount: float, fill: int) -> Image.Image:
    shift = amount * image.width
    return _affine(image, (1, 0, shift, 0, 1, 0), Image.Resampling.NEAREST, fill)


def _translate_y(image: Image.Image, amount: float, fill: int) -> Image.Image:
    shift = amount * image.height
    return _affine(image, (1, 0, 0, 0, 1, shift), Image.Resampling.NEAREST, fill)


def _rotate(image: Image.Image, degrees: float, fill: int) -> Image.Image:
    # Always grey around, and never the other way (no sign): so was the published
    # classifier trained.
    return image.rotate(degrees, fillcolor=_grey(image, 128))


def _color(image: Image.Image, amount: float, fill: int) -> Image.Image:
    return ImageEnhance.Color(image).enhance(1 + amount)


def _contrast(image: Image.Image, amount: float, fill: int) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(1 + amount)


def _sharpness(image: Image.Image, amount: float, fill: int) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(1 + amount)


def _brightness(image: Image.Image, amount: float, fill: int) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1 + amount)


def _posterize(image: Image.Image, bits: float, fill: int) -> Image.Image:
    return ImageOps.posterize(image, int(bits))


def _solarize(image: Image.Image, level: float, fill: int) -> Image.Image:
    # A grey level, not a count: Pillow's stubs ask for a whole number.
    return ImageOps.solarize(image, level)  # type: ignore[arg-type]


def _autocontrast(image: Image.Image, unused: float, fill: int) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, unused: float, fill: int) -> Image.Image:
    return ImageOps.equalize(image)


def _invert(image: Image.Image, unused: float, fill: int) -> Image.Image:
    return ImageOps.invert(image)


AUTOAUGMENT_OPS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "shearX": _shear_x,
    "shearY": _shear_y,
    "translateX": _translate_x,
    "translateY": _translate_y,
    "rotate": _rotate,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "brightness": _brightness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": _invert,
}

# The rest has no direction: rotation by the authors' slip, the others by nature.
SIGNED_OPS = frozenset(
    ("shearX", "shearY", "translateX", "translateY")
    + ("color", "contrast", "sharpness", "brightness")
)


def apply_step(
    image: Image.Image, name: str, magnitude_index: int, sign: int, fill: int = 0
) -> Image.Image:
    """One operation of AutoAugment.

    Args:
      image: a Pillow image, grey or RGB.
      name: a key of `AUTOAUGMENT_OPS`.
      magnitude_index: 0..9, into `MAGNITUDES[name]`.
      sign: +1 or -1, the direction; used by `SIGNED_OPS` only.
      fill: grey level of pixels from outside the image (rotation: always 128).
    """
    amount = float(MAGNITUDES[name][magnitude_index])
    if name in SIGNED_OPS:
        amount *= sign
    return AUTOAUGMENT_OPS[name](image, amount, fill)


def autoaugment_cifar10(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of the 25 sub-policies at random, each of its two steps by its probability.

    Black fill. Grey-scale images go through the same operations, of which `color`
    changes nothing.
    """
    pillow = _to_pillow(image)
    for step in CIFAR10_POLICY[rng.integers(len(CIFAR10_POLICY))]:
        applied = rng.random() < step.probability
        sign = 1 if rng.random() < 0.5 else -1
        if applied:
            pillow = apply_step(pillow, step.name, step.magnitude_index, sign)
    return _from_pillow(pillow)


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

_CALL = re.compile(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*")


def parse(spec: str) -> Augmentation:
    """Reads a pipeline such as `"pad_crop(4)|flip"`; applied from left to right.

    The result can be pickled. The empty string changes nothing.

    Raises:
      UserError: an unknown operation or a wrong argument.
    """
    calls = (
        [_parse_call(call, spec) for call in spec.split("|")] if spec.strip() else []
    )
    return functools.partial(_apply, tuple(calls))


def _apply(
    calls: tuple[Augmentation, ...], image: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    for call in calls:
        image = call(image, rng)
    return image


def _parse_call(call: str, spec: str) -> Augmentation:
    match = _CALL.fullmatch(call)
    name = match[1] if match else call.strip()
    if match is None or name not in OPS:
        near = difflib.get_close_matches(name, OPS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(
            f"unknown augmentation {call.strip()!r} in {spec!r}{hint}; the operations "
            f"are {', '.join(op.example for op in OPS.values())}, joined by |"
        )
    op = OPS[name]
    words = [word.strip() for word in match[2].split(",")] if match[2] else []
    keywords = _keywords(op, words)
    if keywords is None:
        raise UserError(
            f"wrong arguments of the augmentation {call.strip()!r} in {spec!r}: write "
            f"{op.example}"
            + (", with a whole number of pixels above 0" if op.size_name else "")
        )
    return functools.partial(op.function, **keywords)


def _keywords(op: Op, words: list[str]) -> dict[str, int | str] | None:
    """The parameters that `words` set, or None if they are wrong."""
    keywords: dict[str, int | str] = {}
    if op.size_name:
        if not words or not words[0].isdecimal() or int(words[0]) == 0:
            return None
        keywords[op.size_name] = int(words.pop(0))
    if words and words[0] in op.interpolations:
        keywords["interpolation"] = words.pop(0)
    return None if words else keywords
