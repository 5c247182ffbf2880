"""Encoded images to arrays, and arrays to and from Pillow."""

import io

import numpy as np
from PIL import Image

from atebm_jax.errors import UserError

# No others: Pillow would hand some, such as PostScript, to programs of the system.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_MOST_PIXELS = 2**26


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
      ValueError: the image is truncated, broken, not an image, larger than 2**26
        pixels, or of 32-bit numbers, of which nobody knows what is white.
    """
    if channels not in (1, 3):
        raise UserError(f"images have 1 or 3 channels, got {channels}")
    if isinstance(image, np.ndarray):
        if image.ndim == 3 and image.shape[2] == channels:
            return image
        return _pixels(to_pillow(image), channels)
    try:
        return _pixels(_open(image), channels)
    except MemoryError:
        raise
    except Exception as error:  # broken files raise nearly anything in Pillow
        raise ValueError(f"cannot decode the image: {error}") from error


def _open(encoded: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    check_size(image)
    image.load()
    return image


def check_size(image: Image.Image) -> None:
    """Refuses an opened image by its header: a few bytes may ask for gigabytes.

    Raises:
      ValueError: it claims more than 2**26 pixels.
    """
    if image.width * image.height > _MOST_PIXELS:
        raise ValueError(f"it claims {image.width} x {image.height} pixels")


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    mode = "L" if channels == 1 else "RGB"
    return from_pillow(image if image.mode == mode else _convert(image, mode))


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if has_16_bits(image):
        image = Image.fromarray(high_bytes(image))
    if image.mode in ("I", "F"):
        raise ValueError("its numbers of 32 bits have no known black and white")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def has_16_bits(image: Image.Image) -> bool:
    """Whether an opened image holds numbers of 16 bits; a copy of it may not tell."""
    return image.mode.startswith("I;16") or (
        image.mode == "I" and image.format == "PPM"
    )


def high_bytes(image: Image.Image) -> np.ndarray:
    """[H, W] uint8 of an image of 16 bits: Pillow would clip at 255, not scale."""
    return (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)


def to_pillow(image: np.ndarray) -> Image.Image:
    grey = image.ndim == 3 and image.shape[2] == 1
    return Image.fromarray(image[:, :, 0] if grey else image)


def from_pillow(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array
