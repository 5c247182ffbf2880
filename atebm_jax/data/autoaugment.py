"""AutoAugment's CIFAR-10 policy (Cubuk et al., 2019, arXiv:1805.09501, appendix)."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from atebm_jax.data.decoding import from_pillow, to_pillow

# Sub-policies: (operation, probability, magnitude index) twice.
CIFAR10_POLICY = (
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


# (Pillow image, strength) -> image.
Operation = Callable[[Image.Image, float], Image.Image]


def _affine(
    matrix: Callable[[Image.Image, float], tuple[float, ...]], filter_: Image.Resampling
) -> Operation:
    """An operation by the matrix that takes output pixels to input pixels."""
    return lambda image, amount: image.transform(
        image.size, Image.Transform.AFFINE, matrix(image, amount), filter_
    )


def _enhance(kind: Callable[[Image.Image], Any]) -> Operation:
    return lambda image, amount: kind(image).enhance(1 + amount)


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    # Grey corners and one direction only: the published classifier was trained so.
    return image.rotate(degrees, fillcolor=(128,) * len(image.getbands()))


_SHEAR, _SHIFT = Image.Resampling.BICUBIC, Image.Resampling.NEAREST

AUTOAUGMENT_OPS: dict[str, Operation] = {
    "shearX": _affine(lambda image, x: (1, x, 0, 0, 1, 0), _SHEAR),
    "shearY": _affine(lambda image, y: (1, 0, 0, y, 1, 0), _SHEAR),
    "translateX": _affine(lambda image, x: (1, 0, x * image.width, 0, 1, 0), _SHIFT),
    "translateY": _affine(lambda image, y: (1, 0, 0, 0, 1, y * image.height), _SHIFT),
    "rotate": _rotate,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "brightness": _enhance(ImageEnhance.Brightness),
    "posterize": lambda image, bits: ImageOps.posterize(image, int(bits)),
    # A grey level is at least `level` if it is at least the next whole number.
    "solarize": lambda image, level: ImageOps.solarize(image, math.ceil(level)),
    "autocontrast": lambda image, amount: ImageOps.autocontrast(image),
    "equalize": lambda image, amount: ImageOps.equalize(image),
    "invert": lambda image, amount: ImageOps.invert(image),
}

# The others have no direction: rotation by the authors' slip, the rest by nature.
SIGNED_OPS = frozenset(
    ("shearX", "shearY", "translateX", "translateY")
    + ("color", "contrast", "sharpness", "brightness")
)


def apply_step(
    image: Image.Image, name: str, magnitude_index: int, sign: int
) -> Image.Image:
    """One operation of AutoAugment; pixels from outside are black (rotation: grey).

    Args:
      image: a Pillow image, grey or RGB.
      name: a key of `AUTOAUGMENT_OPS`.
      magnitude_index: 0..9, into `MAGNITUDES[name]`.
      sign: +1 or -1, the direction; used by `SIGNED_OPS` only.
    """
    amount = float(MAGNITUDES[name][magnitude_index])
    if name in SIGNED_OPS:
        amount *= sign
    return AUTOAUGMENT_OPS[name](image, amount)


def autoaugment_cifar10(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of the 25 sub-policies at random, each of its two steps by its probability.

    Grey-scale images go through the same operations, of which `color` changes nothing.
    """
    pillow = to_pillow(image)
    policy = CIFAR10_POLICY[rng.integers(len(CIFAR10_POLICY))]
    for name, probability, magnitude_index in policy:
        applied = rng.random() < probability
        sign = 1 if rng.random() < 0.5 else -1
        if applied:
            pillow = apply_step(pillow, name, magnitude_index, sign)
    return from_pillow(pillow)
