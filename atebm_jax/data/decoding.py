"""Encoded images to arrays, and arrays to and from Pillow."""

import io

import numpy as np
from PIL import Image

from atebm_jax.errors import UserError


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
        opened = to_pillow(image)
    else:
        opened = _open(image)
    mode = "L" if channels == 1 else "RGB"
    return from_pillow(opened if opened.mode == mode else _convert(opened, mode))


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


def to_pillow(image: np.ndarray) -> Image.Image:
    grey = image.ndim == 3 and image.shape[2] == 1
    return Image.fromarray(image[:, :, 0] if grey else image)


def from_pillow(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array
