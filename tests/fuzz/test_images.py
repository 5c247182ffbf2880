"""Broken images are told as such: no other error, and no picture that is not there."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from budget import budget
from hypothesis import event, given
from hypothesis import strategies as st
from PIL import Image

from atebm_jax import UserError, data
from atebm_jax.sample import files

HEIGHT, WIDTH = 24, 37


def picture(mode: str) -> Image.Image:
    """Colours that change from left to right, with some noise; nothing is dark."""
    rng = np.random.default_rng(0)
    slope = np.linspace(64, 224, WIDTH)[None, :, None] * [1.0, 0.8, 0.6, 1.0]
    noise = rng.integers(0, 32, (HEIGHT, WIDTH, 4))
    pixels = (slope + noise).astype(np.uint8)
    grey = pixels[:, :, 0]
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 256)
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) / 255)
    if mode == "I":
        return Image.fromarray(grey.astype(np.int32) * 2**20)
    if mode == "RGBA":
        return Image.fromarray(pixels)
    return Image.fromarray(pixels[:, :, :3]).convert(mode)


# Format, mode and options of files as they are met.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "png": ("PNG", "RGB", {}),
    "png, grey": ("PNG", "L", {}),
    "png, one bit": ("PNG", "1", {}),
    "png, palette": ("PNG", "P", {}),
    "png, alpha": ("PNG", "RGBA", {}),
    "png, sixteen bits": ("PNG", "I;16", {}),
    "jpeg": ("JPEG", "RGB", {}),
    "jpeg, progressive": ("JPEG", "RGB", {"progressive": True}),
    "jpeg, grey": ("JPEG", "L", {}),
    "jpeg, cmyk": ("JPEG", "CMYK", {}),
    "gif": ("GIF", "P", {}),
    "gif, transparent": ("GIF", "P", {"transparency": 0}),
    "webp": ("WEBP", "RGB", {}),
    "webp, lossless": ("WEBP", "RGBA", {"lossless": True}),
    "bmp": ("BMP", "RGB", {}),
    "bmp, palette": ("BMP", "P", {}),
    "tiff": ("TIFF", "RGB", {}),
    "tiff, lzw": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "tiff, deflate": ("TIFF", "RGBA", {"compression": "tiff_deflate"}),
    "tiff, cmyk": ("TIFF", "CMYK", {}),
    "tiff, sixteen bits": ("TIFF", "I;16", {}),
    "tiff, 32 bits": ("TIFF", "I", {}),
    "tiff, floats": ("TIFF", "F", {}),
    "ppm": ("PPM", "RGB", {}),
    "pgm, sixteen bits": ("PPM", "I;16", {}),
    "pfm": ("PPM", "F", {}),
}
# Of 32-bit numbers nobody knows what is white.
UNKNOWN = {"tiff, 32 bits", "tiff, floats", "pfm"}


def encode(kind: str) -> bytes:
    form, mode, options = KINDS[kind]
    stream = io.BytesIO()
    picture(mode).save(stream, form, **options)
    return stream.getvalue()


def animation(form: str) -> bytes:
    stream = io.BytesIO()
    frames = [picture("RGB"), picture("RGB").rotate(180)]
    frames[0].save(stream, form, save_all=True, append_images=frames[1:], duration=9)
    return stream.getvalue()


def decoded(encoded: bytes, channels: int) -> np.ndarray | None:
    """The image, or None where decoding says in one line that there is none."""
    try:
        image = data.decode(encoded, channels)
    except ValueError as error:
        assert "cannot decode the image" in str(error)
        return None
    assert image.dtype == np.uint8 and image.shape[2] == channels
    return image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - UNKNOWN))
def test_every_usual_format_is_decoded(kind, channels):
    image = decoded(encode(kind), channels)
    assert image is not None and image.shape == (HEIGHT, WIDTH, channels)
    assert image.mean() > 64


@pytest.mark.parametrize("kind", sorted(UNKNOWN))
def test_numbers_without_a_known_white_are_no_black_image(kind):
    with pytest.raises(ValueError, match="no known black and white"):
        data.decode(encode(kind), 3)


def test_grey_levels_of_sixteen_bits_are_scaled_in_every_format():
    expected = np.asarray(picture("I;16")) >> 8
    for kind in ("png, sixteen bits", "tiff, sixteen bits", "pgm, sixteen bits"):
        image = data.decode(encode(kind), 1)
        np.testing.assert_allclose(image[:, :, 0], expected, atol=1, err_msg=kind)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation_is_taken(form):
    image = decoded(animation(form), 3)
    assert image is not None and image.shape == (HEIGHT, WIDTH, 3)
    first = np.asarray(picture("RGB"), np.float32)
    nearer = [np.abs(image - frame).mean() for frame in (first, first[::-1, ::-1])]
    assert nearer[0] < nearer[1] / 2


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        check = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "encoded",
    [
        png_of_size(10_000, 8_000),
        png_of_size(2**31 - 1, 2**31 - 1),
        b"P6 60000 60000 255\n",
        b"BM"
        + struct.pack("<III", 99, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 40_000, 40_000, 1, 24, 0, 0, 0, 0, 0, 0),
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"\x3b",
    ],
    ids=["png", "largest png", "ppm", "bmp", "gif"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_claimed_size_is_not_believed(encoded):
    with pytest.raises(ValueError, match="cannot decode the image"):
        data.decode(encoded, 3)


@pytest.mark.parametrize(
    "encoded", [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\x00" * 99]
)
def test_what_is_no_image_is_never_handed_on(encoded, monkeypatch):
    """PostScript, say, which Pillow gives to Ghostscript."""
    monkeypatch.setattr("subprocess.Popen", pytest.fail)
    with pytest.raises(ValueError, match="cannot decode the image"):
        data.decode(encoded, 3)


@pytest.mark.filterwarnings("ignore")
@budget(150)
@given(
    st.sampled_from(sorted(KINDS.keys() - UNKNOWN)),
    st.floats(0, 1),
    st.sampled_from((1, 3)),
)
def test_truncated_file_is_whole_or_refused(kind, part, channels):
    whole = encode(kind)
    cut = whole[: int(part * len(whole))]
    image = decoded(cut, channels)
    event("refused" if image is None else "whole")
    if image is not None:
        np.testing.assert_array_equal(image, data.decode(whole, channels))


@st.composite
def damaged(draw: Any) -> bytes:
    """A file with some bytes changed, most of them in its head, or parts moved."""
    encoded = bytearray(encode(draw(st.sampled_from(sorted(KINDS)))))
    last = len(encoded) - 1
    places = st.one_of(st.integers(0, min(last, 128)), st.integers(0, last))
    for _ in range(draw(st.integers(1, 8))):
        encoded[draw(places)] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        start, end = sorted((draw(places), draw(places)))
        encoded[start:end] = draw(st.binary(max_size=64))
    return bytes(encoded)


@pytest.mark.filterwarnings("ignore")
@budget(200)
@given(damaged(), st.sampled_from((1, 3)))
def test_damaged_file_is_decoded_or_refused(encoded, channels):
    image = decoded(encoded, channels)
    event("refused" if image is None else "decoded")


@pytest.mark.filterwarnings("ignore")
@budget(20)
@given(st.one_of(damaged(), st.binary(max_size=200)), st.sampled_from((1, 3)))
def test_reader_of_samples_names_a_damaged_file(tmp_path_factory, encoded, channels):
    path = tmp_path_factory.mktemp("samples") / "000001_class3.png"
    path.write_bytes(encoded)
    try:
        image = files.read_image(path, (HEIGHT, WIDTH, channels))
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert image.shape == (HEIGHT, WIDTH, channels) and image.dtype == np.uint8


@pytest.mark.filterwarnings("ignore")
@budget(2)
@given(st.lists(damaged(), min_size=4, max_size=4))
def test_folder_with_damaged_images_trains_on_the_others(tmp_path_factory, broken):
    root = tmp_path_factory.mktemp("folder") / "class"
    root.mkdir()
    names = ("a.png", "b.JPG", "c.gif", "d.ppm")
    for name, encoded in zip(names, broken, strict=True):
        (root / name).write_bytes(encoded)
    for number in range(4):
        picture("RGB").save(root / f"good{number}.png")
    source = data.open_source(f"folder:{root.parent}")
    images, labels = data.materialise(source, "resize(8)|center_crop(8)", (8, 8, 3))
    bad = sum(decoded(encoded, 3) is None for encoded in broken)
    assert len(images) == len(labels) == 8 - bad
