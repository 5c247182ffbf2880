"""Images that users name: formats, sizes, names."""

import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from atebm_jax import UserError, data
from atebm_jax.data.folder import check_outside
from atebm_jax.sample import inputs
from atebm_jax.trained import Trained

CONFIG = tiny.config()
GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)


def read(path, shape=(8, 8, 1), resize=False, config=CONFIG):
    return inputs.read_file(Path(path), shape, config, resize)


def pictures(named, index=None, config=CONFIG, names=None, **flags):
    """What the command line names, without loading a network."""
    given = {"data_dir": "", "resize": False, "classes_by_place": False} | flags
    given = argparse.Namespace(images=named, index=index, **given)
    return inputs.pictures(given, Trained(None, None, config, {}, None, names))


def saved(folder, image, name="x.png", **options):
    image.save(folder / name, **options)
    return folder / name


def test_grey_and_colour_become_each_other(tmp_path):
    grey = saved(tmp_path, Image.fromarray(GREY))
    np.testing.assert_array_equal(read(grey)[..., 0], GREY)
    np.testing.assert_array_equal(read(grey, (8, 8, 3)), np.stack([GREY] * 3, -1))
    colour = saved(tmp_path, Image.fromarray(COLOUR))
    np.testing.assert_array_equal(read(colour, (8, 8, 3)), COLOUR)
    luminance = COLOUR @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(read(colour)[..., 0], luminance, atol=1)


def test_palettes_and_opaque_alpha_are_read_as_they_look(tmp_path):
    palette = saved(tmp_path, Image.fromarray(GREY).convert("P"))
    np.testing.assert_array_equal(read(palette)[..., 0], GREY)
    opaque = saved(tmp_path, Image.fromarray(COLOUR).convert("RGBA"))
    np.testing.assert_array_equal(read(opaque, (8, 8, 3)), COLOUR)
    grey_alpha = saved(tmp_path, Image.fromarray(GREY).convert("LA"))
    np.testing.assert_array_equal(read(grey_alpha)[..., 0], GREY)
    black_and_white = saved(tmp_path, Image.fromarray(GREY > 100))
    np.testing.assert_array_equal(read(black_and_white)[..., 0], 255 * (GREY > 100))


def test_sixteen_bits_keep_their_upper_half(tmp_path):
    wide = saved(tmp_path, Image.fromarray(GREY.astype(np.uint16) * 256 + 77))
    np.testing.assert_array_equal(read(wide)[..., 0], GREY)
    portable = tmp_path / "x.pgm"  # 32 bits a value in Pillow, 16 in the file
    values = (GREY.astype(">u2") * 256 + 77).astype(">u2")
    portable.write_bytes(b"P5 8 8 65535\n" + values.tobytes())
    np.testing.assert_array_equal(read(portable)[..., 0], GREY)


def test_exif_turns_the_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = saved(tmp_path, Image.fromarray(GREY), "x.png", exif=exif)
    np.testing.assert_array_equal(read(turned)[..., 0], np.rot90(GREY, -1))


def test_damaged_exif_turns_nothing(tmp_path):
    for ending in ("png", "jpg", "webp"):
        options = {"exif": b"Exif\0\0no camera", "quality": 95}
        path = saved(tmp_path, Image.fromarray(COLOUR), f"x.{ending}", **options)
        np.testing.assert_allclose(read(path, (8, 8, 3)), COLOUR, atol=60)
        if ending == "png":
            np.testing.assert_array_equal(read(path, (8, 8, 3)), COLOUR)


def test_other_sizes_are_refused_or_cover_the_frame(tmp_path):
    wide = np.full((16, 40), 90, np.uint8)
    wide[:, 12:28] = 200
    path = saved(tmp_path, Image.fromarray(wide))
    with pytest.raises(
        UserError, match="40 x 16 pixels and 8 x 8 are needed.*--resize"
    ):
        read(path)
    # Its middle square, halved; the filter sees a little of what is cut off.
    made = read(path, resize=True)
    np.testing.assert_allclose(made[:, 1:-1], 200, atol=1)
    np.testing.assert_allclose(made, 200, atol=10)


def test_resizing_takes_the_preprocessing_of_the_config(tmp_path):
    config = tiny.config(**{"data.preprocess": "center_crop(8)"})
    large = np.arange(100, dtype=np.uint8).reshape(10, 10)
    path = saved(tmp_path, Image.fromarray(large))
    made = read(path, resize=True, config=config)
    np.testing.assert_array_equal(made[..., 0], large[1:9, 1:9])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Image.new("RGBA", (8, 8), (9, 9, 9, 100)), "transparent pixels"),
        (lambda: Image.fromarray(GREY.astype(np.float32)), "32 bits a value"),
    ],
)
def test_images_without_a_plain_meaning_are_refused(tmp_path, make, message):
    image = make()
    path = saved(tmp_path, image, "x.tif")
    with pytest.raises(UserError, match=message):
        read(path)


def test_animations_and_broken_files_are_refused(tmp_path):
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    path = saved(tmp_path, frames[0], "x.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="several frames"):
        read(path)
    whole = saved(tmp_path, Image.fromarray(COLOUR)).read_bytes()
    for content in (whole[:60], b"no image", b""):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as an image"):
            read(tmp_path / "x.png")
    # PostScript would be run, by a program of the system.
    postscript = saved(tmp_path, Image.fromarray(COLOUR), "x.eps")
    with pytest.raises(UserError, match="cannot be read as an image"):
        read(postscript)


def test_broken_files_of_every_format_are_told_in_one_sentence(tmp_path):
    generator = np.random.default_rng(0)
    for ending in ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm"):
        whole = saved(tmp_path, Image.fromarray(COLOUR), f"x.{ending}").read_bytes()
        path = tmp_path / f"y.{ending}"
        for _ in range(60):
            broken = np.frombuffer(whole, np.uint8)[: generator.integers(len(whole))]
            broken = broken.copy()
            broken[generator.integers(len(broken) or 1) :][:1] ^= 255
            path.write_bytes(broken.tobytes())
            try:
                read(path, (8, 8, 3))
            except UserError as error:
                assert str(path) in str(error)


def test_names_of_files_tell_images_apart(tmp_path):
    for name in ("a/cat.png", "b/cat.png", "b/dog.png", "b/dog.bmp"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(GREY).save(path)

    def names(*paths):
        chosen = [str(tmp_path / path) for path in paths]
        return [p.name for p in pictures(chosen)]

    assert names("a/cat.png", "b/dog.png") == ["cat", "dog"]
    assert names("b/dog.png", "b/dog.bmp") == ["dog.png", "dog.bmp"]
    assert names("a/cat.png", "b/cat.png") == ["a_cat.png", "b_cat.png"]
    assert names("b") == ["cat.png", "dog.bmp", "dog.png"]


def test_names_of_results_are_short_and_can_be_written_everywhere(tmp_path):
    given = (b"n" * 233, b"n" * 232 + b"m", "\u00e9".encode() * 120, b"caf\xe9")
    for name in given:
        path = os.path.join(os.fsencode(tmp_path), name + b".png")
        Image.fromarray(GREY).save(os.fsdecode(path))
    found = pictures([str(tmp_path)])
    made = {picture.name for picture in found}
    assert len(made) == 4 and "caf\\xe9" in made
    for name in made:
        assert len(name.encode()) <= 128
    for picture in found:
        assert picture.origin.encode()
        np.testing.assert_array_equal(picture.read((8, 8, 1))[..., 0], GREY)


def test_labels_of_data_sets_follow_the_names_of_the_network():
    names = [str(9 - k) for k in range(10)]

    def chosen(**options):
        return pictures(["digits:test"], "0:4", **options)

    own = [picture.label for picture in chosen()]
    followed = [picture.label for picture in chosen(names=names)]
    assert followed == [9 - label for label in own]
    names[0] = "nine"
    with pytest.raises(UserError, match="'nine' and '9' say"):
        chosen(names=names)
    by_place = chosen(names=names, classes_by_place=True)
    assert [picture.label for picture in by_place] == own


def test_link_to_nowhere_in_a_data_set_is_named(tmp_path):
    for label in range(10):
        (tmp_path / str(label)).mkdir()
        saved(tmp_path / str(label), Image.fromarray(GREY))
    (tmp_path / "3" / "y.png").symlink_to("nowhere")
    with pytest.raises(UserError, match="3/y.png cannot be read.*leave it out"):
        pictures([f"folder:{tmp_path}"], "all")
    found = pictures([f"folder:{tmp_path}"], "0:4,5")
    assert [picture.label for picture in found] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", data.KINDS)
def test_data_sets_of_every_kind_are_no_files(kind):
    with pytest.raises(UserError) as refused:
        pictures([f"{kind}nowhere"], "0")
    for wrong in ("there is no image", "unknown data source"):
        assert wrong not in str(refused.value)


def test_places_are_numbers_and_runs():
    chosen = pictures(["digits:test"], "7,0:3,2")
    numbers = [int(p.name.rpartition("_")[2]) for p in chosen]
    assert numbers == [7, 0, 1, 2]


def test_paths_that_lead_nowhere_are_told(tmp_path):
    """Names that no file system takes, and links that lead round and round."""
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / ("n" * 300), tmp_path / "loop", tmp_path / "loop" / "x"):
        with pytest.raises(UserError, match="there is no image"):
            pictures([str(path)])
        with pytest.raises(UserError, match="there is no mask"):
            inputs.read_mask(path, (8, 8, 1), CONFIG, False)
        check_outside("--out", path, tmp_path / "other")
        with pytest.raises(UserError, match="whose images are read"):
            check_outside("--out", path, tmp_path)
