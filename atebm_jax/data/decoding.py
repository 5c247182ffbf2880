"""Encoded images to arrays, and arrays to and from Pillow."""

import functools
import io
import zlib

import numpy as np
from PIL import Image

from atebm_jax.errors import UserError

# No others: Pillow hands some, such as PostScript, to programs of the system, and
# recognises some by little more than their length.
FORMATS = (
    *("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP"),
)
# JPEGs of telephones, with a preview behind the image; Pillow reads them as JPEGs.
_LIKE_JPEG = "MPO"

# A header of a few bytes may claim an image of gigabytes.
_MOST_PIXELS = 2**26


@functools.cache
def extensions() -> frozenset[str]:
    """Extensions of image files of `FORMATS`, such as ".jpg"."""
    known = Image.registered_extensions().items()
    return frozenset(end for end, form in known if form in (*FORMATS, _LIKE_JPEG))


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
        pixels, or of 32-bit numbers, whose black and white are not known.
    """
    if channels not in (1, 3):
        raise UserError(f"images have 1 or 3 channels, got {channels}")
    if isinstance(image, np.ndarray):
        if image.ndim == 3 and image.shape[2] == channels:
            return image
        return _pixels(to_pillow(image), channels)
    try:
        return _pixels(open_image(image), channels)
    except MemoryError:
        raise
    except Exception as error:  # broken files raise nearly anything in Pillow
        raise ValueError(f"cannot decode the image: {error}") from error


def open_image(encoded: bytes) -> Image.Image:
    """Opens and loads an image file.

    A PNG whose pixels are whole is read whatever its other parts hold: texts, colour
    profiles and camera data may be damaged, or larger than Pillow takes.

    Raises:
      Exception: of any kind, if it is broken or not of `FORMATS`.
    """
    try:
        return _load(encoded)
    except MemoryError:
        raise
    except Exception:
        plain = _pixels_alone(encoded) if encoded.startswith(_PNG) else encoded
        if plain == encoded:
            raise
        return _load(plain)


def _load(encoded: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    if image.width * image.height > _MOST_PIXELS:
        raise ValueError(f"it claims {image.width} x {image.height} pixels")
    # Pillow does not check that the end marker comes after the data.
    data, end = encoded.find(b"\xff\x93"), encoded.rfind(b"\xff\xd9")
    if image.format == "JPEG2000" and not end > data >= 0:
        raise ValueError("it is truncated")
    image.load()
    return image


_PNG = b"\x89PNG\r\n\x1a\n"
# Optional chunks that pixels depend on: transparency, and frames of animations.
_NEEDED = (b"tRNS", b"acTL", b"fcTL", b"fdAT")


def _pixels_alone(png: bytes) -> bytes:
    """A PNG without its optional chunks; camera data stay if they are intact."""
    parts, place = [_PNG], len(_PNG)
    while place + 12 <= len(png):
        length = int.from_bytes(png[place : place + 4], "big")
        chunk = png[place : place + 12 + length]
        name, check = chunk[4:8], int.from_bytes(chunk[-4:], "big")
        intact = name == b"eXIf" and zlib.crc32(chunk[4:-4]) == check
        # A chunk whose name begins with a small letter is optional.
        if not name[:1].islower() or name in _NEEDED or intact:
            parts.append(chunk)
        place += 12 + length
    return b"".join(parts) + png[place:]


class BadImage(ValueError):
    """An image that cannot be augmented; it counts as a broken one."""


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    mode = "L" if channels == 1 else "RGB"
    if has_16_bits(image):
        image = Image.fromarray(high_bytes(image))
    if image.mode in ("I", "F"):
        raise ValueError("its numbers of 32 bits have no known black and white")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return from_pillow(image if image.mode == mode else image.convert(mode))


def has_16_bits(image: Image.Image) -> bool:
    """Whether an opened image has 16 bits a pixel; a copy has lost its format."""
    return image.mode.startswith("I;16") or (
        image.mode == "I" and image.format == "PPM"
    )


def high_bytes(image: Image.Image) -> np.ndarray:
    """[H, W] uint8 of an image of 16 bits: Pillow would clip at 255, not scale."""
    return (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)


def to_pillow(image: np.ndarray) -> Image.Image:
    """uint8 [H, W], [H, W, 1] or [H, W, 3] as a picture."""
    grey = image.ndim == 3 and image.shape[2] == 1
    return Image.fromarray(image[:, :, 0] if grey else image)


def from_pillow(image: Image.Image) -> np.ndarray:
    """Undoes `to_pillow`: uint8 [H, W, C]."""
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def scaled(
    image: np.ndarray,
    height: int,
    width: int,
    method: str,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """uint8 [H, W, C] at another size, by a method of Pillow, "bicubic" say.

    With a box (left, top, right, bottom; pixels) only what lies in it is scaled.
    """
    filter_ = Image.Resampling[method.upper()]
    return from_pillow(to_pillow(image).resize((width, height), filter_, box))
