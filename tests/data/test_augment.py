import io
import pickle
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from atebm_jax.data import augment, autoaugment, decode
from atebm_jax.data.augment import parse
from atebm_jax.data.decoding import BadImage
from atebm_jax.errors import UserError

SIGNS = {"p": 1, "n": -1}


@pytest.mark.parametrize("name", sorted(autoaugment.AUTOAUGMENT_OPS))
def test_autoaugment_operation_equals_the_reference(golden, name):
    keys = [key for key in golden.files if key.startswith(f"op/{name}/")]
    assert keys
    for key in keys:
        _, _, index, sign = key.split("/")
        for before, after in zip(golden["images_u8"], golden[key]):
            out = autoaugment.apply_step(
                Image.fromarray(before), name, int(index[1:]), SIGNS[sign]
            )
            np.testing.assert_array_equal(np.asarray(out), after, err_msg=key)


def test_autoaugment_magnitudes_equal_the_reference(golden):
    for name, values in autoaugment.MAGNITUDES.items():
        np.testing.assert_allclose(values, golden[f"magnitudes/{name}"], atol=1e-12)


def test_autoaugment_policy_is_the_reference_policy(golden):
    policy = autoaugment.CIFAR10_POLICY
    for slot in range(2):
        expected = zip(
            golden[f"subpolicy/op{slot + 1}"].tolist(),
            golden["subpolicy/probabilities"][:, slot].tolist(),
            golden["subpolicy/magnitude_index"][:, slot].tolist(),
            strict=True,
        )
        assert [sub[slot] for sub in policy] == list(expected)


@pytest.mark.parametrize("sign", ["p", "n"])
def test_autoaugment_sub_policies_equal_the_reference(golden, sign):
    expected = golden[f"subpolicy/out_all_applied_{sign}"]
    for sub_policy, outputs in zip(autoaugment.CIFAR10_POLICY, expected):
        for before, after in zip(golden["images_u8"], outputs):
            out = Image.fromarray(before)
            for name, probability, index in sub_policy:
                if probability > 0:
                    out = autoaugment.apply_step(out, name, index, SIGNS[sign])
            np.testing.assert_array_equal(np.asarray(out), after)


def test_cutout_equals_the_reference(golden):
    image = golden["images_u8"][0]
    for (y, x), out in zip(golden["cutout/centers_yx"], golden["cutout/out"]):
        cut = augment.cutout_at(image, int(y), int(x), 16)
        np.testing.assert_array_equal(cut, np.rint(255 * out))


def test_autoaugment_draws_every_sub_policy_and_often_changes_the_image(image):
    rng = np.random.default_rng(0)
    outputs = [autoaugment.autoaugment_cifar10(image, rng) for _ in range(400)]
    assert {out.shape for out in outputs} == {image.shape}
    assert len({out.tobytes() for out in outputs}) > 50


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "spec, shape",
    [
        ("pad_crop(4)|flip|autoaugment_cifar10|cutout(16)", (16, 20)),
        ("random_resized_crop(12)|flip", (12, 12)),
        ("resize(8)|center_crop(8)", (8, 8)),
        ("resize(32, bicubic)", (32, 40)),
        ("", (16, 20)),
    ],
)
def test_pipelines_give_uint8_images_and_leave_the_input(image, channels, spec, shape):
    image = image[:, :, :channels]
    before = image.copy()
    apply = pickle.loads(pickle.dumps(parse(spec)))
    for seed in range(30):
        out = apply(image, np.random.default_rng(seed))
        assert out.dtype == np.uint8 and out.shape == (*shape, channels)
        again = apply(image, np.random.default_rng(seed))
        np.testing.assert_array_equal(out, again)
    np.testing.assert_array_equal(image, before)


def test_operations_apply_from_left_to_right(image):
    rng = np.random.default_rng(0)
    out = parse("center_crop(8)|resize(4)")(image, rng)
    expected = augment.resize(augment.center_crop(image, None, 8), None, 4)
    np.testing.assert_array_equal(out, expected)


def test_pad_crop_shifts_by_up_to_the_padding():
    image = np.zeros((9, 9, 1), np.uint8)
    image[4, 4] = 255
    rng = np.random.default_rng(0)
    crops = [augment.pad_crop(image, rng, 2)[:, :, 0] for _ in range(400)]
    positions = {tuple(np.argwhere(crop)[0].tolist()) for crop in crops}
    assert positions == {(y, x) for y in range(2, 7) for x in range(2, 7)}


def test_pad_crop_fills_with_black():
    white = np.full((4, 4, 3), 255, np.uint8)
    rng = np.random.default_rng(0)
    assert min(augment.pad_crop(white, rng, 2).min() for _ in range(20)) == 0


def test_flip_mirrors_half_of_the_images(image):
    rng = np.random.default_rng(0)
    flipped = 0
    for _ in range(400):
        out = augment.flip(image, rng)
        mirrored = np.array_equal(out, image[:, ::-1])
        assert mirrored or np.array_equal(out, image)
        flipped += mirrored
    assert 160 < flipped < 240


def test_random_box_has_the_areas_and_aspects_it_should():
    rng = np.random.default_rng(0)
    for _ in range(500):
        top, left, height, width = augment._random_box(200, 300, rng)
        assert 0 <= top <= 200 - height and 0 <= left <= 300 - width
        assert 0.078 < height * width / 60_000 <= 1
        assert 0.73 < width / height < 1.37


@pytest.mark.parametrize("height, width", [(1, 100), (100, 1)])
def test_random_box_of_a_sliver_stays_inside(height, width):
    rng = np.random.default_rng(0)
    for _ in range(50):
        top, left, h, w = augment._random_box(height, width, rng)
        assert h >= 1 and w >= 1 and top + h <= height and left + w <= width


LINES = [(1, 6000), (6000, 1), (1, 60_000), (2, 60_001), (60_000, 1), (300, 40_000)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", LINES)
def test_memory_of_thin_images_is_that_of_the_result(shape, channels):
    image = np.random.default_rng(0).integers(0, 256, (*shape, channels), np.uint8)
    prepare = parse("resize(292,bicubic)|center_crop(256)")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = prepare(image, np.random.default_rng(0))
    assert out.shape == (256, 256, channels)
    # KiB; whole, these would take 1.5 to 26 GB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17


@pytest.mark.parametrize(
    "spec",
    ["resize(292,bicubic)|center_crop(256)", "resize(8)|center_crop(8)"]
    + ["resize(32)|center_crop(64)", "resize(5)|center_crop(4)|resize(9)"],
)
@pytest.mark.parametrize("shape", [(1, 100), (9, 300), (16, 20), (40, 41), (301, 200)])
def test_crop_that_follows_a_resize_changes_no_bit(spec, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    one_by_one = image
    for call in spec.split("|"):
        one_by_one = parse(call)(one_by_one, np.random.default_rng(0))
    np.testing.assert_array_equal(parse(spec)(image, None), one_by_one)


@pytest.mark.parametrize("shape", [(9, 300), (16, 20), (301, 200), (7, 7), (2, 5000)])
@pytest.mark.parametrize("filter_", ["bilinear", "bicubic"])
def test_thin_way_gives_the_same_picture(monkeypatch, shape, filter_):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for size, crop in ((29, 25), (5, 4), (32, 64)):
        settings = {"size": size, "crop": crop, "interpolation": filter_}
        whole = augment.resize(image, None, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(augment, "_room", lambda size: 0)
            thin = augment.resize(image, None, **settings)
        np.testing.assert_allclose(thin.astype(int), whole, rtol=0, atol=1)


def test_thin_image_that_no_crop_follows_is_a_bad_one():
    image = np.zeros((1, 60_000, 3), np.uint8)
    with pytest.raises(BadImage, match="60000 x 1 pixels would become 17520000 x 292"):
        parse("resize(292)|flip|center_crop(256)")(image, np.random.default_rng(0))


def test_random_resized_crop_keeps_a_flat_image():
    flat = np.full((40, 50, 3), 77, np.uint8)
    out = augment.random_resized_crop(flat, np.random.default_rng(0), 16)
    assert out.shape == (16, 16, 3) and (out == 77).all()


def test_resize_averages_when_it_shrinks():
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    out = augment.resize(checks.astype(np.uint8)[:, :, None], None, 8)
    assert 120 < out.min() and out.max() < 136  # without antialiasing: 0 or 255


def test_center_crop_takes_the_middle_and_leaves_short_sides():
    image = np.arange(25, dtype=np.uint8).reshape(5, 5, 1)
    middle = augment.center_crop(image, None, 3)
    np.testing.assert_array_equal(middle, image[1:4, 1:4])
    assert augment.center_crop(image[:2], None, 3).shape == (2, 3, 1)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("flipp", "'flipp' in .*: choose one of pad_crop.*Did you mean 'flip'"),
        ("rezise(256)", "Did you mean 'resize\\(256\\)'"),
        ("flip|", "unknown augmentation '' in 'flip|', operations joined by |"),
        ("cutout", "cutout\\(16\\)"),
        ("cutout(-3)", "cutout\\(16\\)"),
        ("cutout(0)", "1 to 8192"),
        ("flip(3)", "write flip"),
        ("resize(8,lanczos)", "bicubic"),
        ("pad_crop(4,4)", "pad_crop\\(4\\)"),
        ("pad_crop(4", "unknown augmentation"),
    ],
)
def test_wrong_strings_are_explained(spec, message):
    with pytest.raises(UserError, match=message):
        parse(spec)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_decode_converts_every_mode(mode, channels):
    buffer = io.BytesIO()
    kind = "TIFF" if mode == "CMYK" else "PNG"
    Image.new("RGB", (6, 4), (200, 200, 200)).convert(mode).save(buffer, kind)
    out = decode(buffer.getvalue(), channels)
    assert out.shape == (4, 6, channels) and out.dtype == np.uint8
    if mode not in ("P", "1"):
        assert (abs(out.astype(int) - 200) <= 1).all()


def test_decode_scales_sixteen_bits(encode):
    deep = np.full((4, 6), 0x8000, np.uint16)
    assert (decode(encode(deep, "PNG"), 3) == 128).all()


def test_decode_passes_arrays_and_converts_their_channels(image):
    assert decode(image, 3) is image
    grey = decode(image, 1)
    assert grey.shape == (16, 20, 1)
    np.testing.assert_array_equal(decode(grey, 3)[:, :, 2], grey[:, :, 0])
    assert decode(image[:, :, 0], 1).shape == (16, 20, 1)


def test_decode_ignores_the_exif_orientation(image):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", exif=exif)
    assert decode(buffer.getvalue(), 3).shape == image.shape


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9])
def test_decode_refuses_truncated_files(image, encode, kind, part):
    big = np.tile(image, (8, 8, 1))
    data = encode(big, kind)
    assert decode(data, 3).shape == big.shape
    with pytest.raises(ValueError):
        decode(data[: int(part * len(data))], 3)


def test_decode_refuses_text():
    with pytest.raises(ValueError, match="cannot decode"):
        decode(b"<html>not found</html>", 3)


def chunk(name, body, check=None):
    check = zlib.crc32(name + body) if check is None else check
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)


LARGE = zlib.compress(bytes(3 << 20))


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"key\0\0" + LARGE),
        chunk(b"iTXt", b"key\0\1\0\0\0" + LARGE),
        chunk(b"iCCP", b"name\0\0" + LARGE),
        chunk(b"eXIf", b"no camera"),
        chunk(b"eXIf", b"no camera", check=7),
        chunk(b"tEXt", b"key\0value", check=7),
        chunk(b"pHYs", b""),
    ],
    ids=["zTXt", "iTXt", "iCCP", "eXIf", "eXIf, check", "tEXt, check", "pHYs"],
)
def test_png_is_read_whatever_stands_beside_its_pixels(image, encode, extra):
    whole = encode(image, "PNG")
    for place in (33, len(whole) - 12):  # before the pixels, behind them
        encoded = whole[:place] + extra + whole[place:]
        np.testing.assert_array_equal(decode(encoded, 3), image)
    for cut in (whole[: len(whole) // 2], whole[:33] + extra + whole[33:90]):
        with pytest.raises(ValueError, match="cannot decode"):
            decode(cut, 3)


def test_png_keeps_its_transparency_without_its_texts(encode):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    buffer = io.BytesIO()
    Image.fromarray(grey).convert("P").save(buffer, "PNG", transparency=3)
    whole = buffer.getvalue()
    encoded = whole[:33] + chunk(b"zTXt", b"key\0\0" + LARGE) + whole[33:]
    np.testing.assert_array_equal(decode(encoded, 3), decode(whole, 3))


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "QOI"])
def test_newer_formats_are_decoded_whole_or_refused(image, encode, kind):
    image = image // 8 + 100
    whole = encode(image, kind)
    expected = decode(whole, 3)
    np.testing.assert_allclose(expected, image, atol=40)
    for length in range(0, len(whole), max(len(whole) // 60, 1)):
        try:
            np.testing.assert_array_equal(decode(whole[:length], 3), expected)
        except ValueError as error:
            assert "cannot decode the image" in str(error)
