"""What tells a set of images from another one of the same name."""

import json
import os
import shutil

import numpy as np
import pytest

from atebm_jax import UserError, data
from atebm_jax.data import content, prepare, relabel, sources

WORDS = {"since": "x was begun", "remedy": "give another"}


def write(folder, levels):
    """Grey images of one size in bytes, of the levels that are given by path."""
    for name, level in levels.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"P5 4 4 255 " + bytes([level]) * 16)
    return folder


@pytest.fixture
def folder(tmp_path):
    levels = {f"{c}/{i}.pgm": 100 * k + i for k, c in enumerate("ab") for i in range(4)}
    return write(tmp_path / "images", levels)


def describe(path):
    return content.describe(data.open_source(f"folder:{path}"))


def difference(before, now, **more):
    try:
        content.check("folder", before, now, **WORDS, **more)
    except UserError as error:
        return str(error)
    return ""


def test_same_images_are_the_same_wherever_they_lie(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "else" / "where")
    before = describe(folder)
    assert describe(tmp_path / "else" / "where") == before
    assert json.loads(json.dumps(before)) == before
    assert difference(before, before) == ""


def one_less(folder):
    (folder / "b" / "2.pgm").unlink()


def class_less(folder):
    shutil.rmtree(folder / "b")
    write(folder, {f"a/{i + 4}.pgm": i for i in range(4)})


def class_renamed(folder):
    (folder / "b").rename(folder / "c")


def classes_swapped(folder):
    """Names, number and sizes stay; every label is another one."""
    for old, new in (("a", "x"), ("b", "a"), ("x", "b")):
        (folder / old).rename(folder / new)


def moved_to_another_class(folder):
    (folder / "a" / "3.pgm").rename(folder / "b" / "9.pgm")


def renamed(folder):
    (folder / "a" / "3.pgm").rename(folder / "a" / "4.pgm")


def other_pixels(folder):
    write(folder, {"a/1.pgm": 77})


def other_size(folder):
    with (folder / "a" / "1.pgm").open("ab") as file:
        file.write(b" ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_less, "8 images then, 7 now"),
        (class_less, "2 classes then, 1 now ('b' has gone)"),
        (class_renamed, "class 1 was 'b' then and is 'c' now"),
        (classes_swapped, "8 images then and now, but not the same ones"),
        (moved_to_another_class, "but not the same ones"),
        (renamed, "but not the same ones"),
        (other_pixels, "but not the same ones"),
        (other_size, "but not the same ones"),
    ],
)
def test_changed_folder_is_told_with_what_has_changed(folder, change, message):
    before = describe(folder)
    change(folder)
    said = difference(before, describe(folder))
    assert said.startswith("folder has changed since x was begun: ")
    assert message in said and said.endswith("or give another.")


@pytest.mark.parametrize("change", [other_size, renamed, moved_to_another_class])
def test_images_that_are_not_read_are_known_by_path_and_size(
    folder, change, monkeypatch
):
    monkeypatch.setattr(content, "_NUM_READ", 1)
    before = describe(folder)
    change(folder)
    assert "not the same ones" in difference(before, describe(folder))


def test_classes_by_place_may_have_other_names(folder):
    before = describe(folder)
    (folder / "a").rename(folder / "A")
    now = describe(folder)
    assert "class 0 was 'a' then and is 'A' now" in difference(before, now)
    assert difference(before, now, by_place=True) == ""
    # Another order is other images at the places.
    (folder / "A").rename(folder / "z")
    assert "not the same ones" in difference(before, describe(folder), by_place=True)


@pytest.mark.parametrize("before", [None, [], "damaged"])
def test_without_a_description_there_is_nothing_to_compare(folder, before):
    assert difference(before, describe(folder)) == ""


def test_arrays_are_known_by_their_values():
    images = np.arange(5 * 12, dtype=np.uint8).reshape(5, 2, 2, 3)
    before = content.describe(data.ArraySource(images, np.arange(5)))
    assert before["class_names"] is None and before["num_images"] == 5
    turned = content.describe(data.ArraySource(images, np.arange(5)[::-1]))
    flat = content.describe(data.ArraySource(images.reshape(5, 1, 4, 3), np.arange(5)))
    assert len({d["content"] for d in (before, turned, flat)}) == 3
    # All of them, not only those that are read.
    many = np.zeros((600, 2, 2, 3), np.uint8)
    labels = np.zeros(600, int)
    same = content.describe(data.ArraySource(many, labels, num_classes=2))
    many[1] = 1
    pixels = content.describe(data.ArraySource(many, labels, num_classes=2))
    labels[1] = 1
    label = content.describe(data.ArraySource(many, labels, num_classes=2))
    assert len({d["content"] for d in (same, pixels, label)}) == 3


def test_source_that_lists_nothing_is_known_by_what_is_read(folder):
    class Own:
        spec, num_classes, class_names = "own", 1, ("x",)

        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise OSError("gone")
            return {"image": b"bytes", "label": 0}

        def describe(self, index):
            return "own"

    assert list(sources.listing(Own())) == []
    assert content.describe(Own()) == content.describe(Own())


def test_labels_that_follow_names_belong_to_the_images(folder):
    source = data.open_source(f"folder:{folder}")
    followed = relabel.follow(source, ("b", "a"), "folder")
    assert list(followed.listing()) == list(source.listing())
    assert content.describe(followed)["class_names"] == ["b", "a"]
    assert content.describe(followed)["content"] != describe(folder)["content"]


def test_prepared_set_is_known_by_its_shards(folder, tmp_path):
    for name, num_workers in (("one", 1), ("two", 2)):
        source = data.open_source(f"folder:{folder}")
        # The second time records have been read here, by threads of the library.
        settings = {"size": 2, "shard_size": 3, "num_workers": num_workers}
        prepare.prepare(source, tmp_path / name, **settings)
        other_pixels(folder)
    one, two = (data.open_source(f"prepared:{tmp_path / n}") for n in ("one", "two"))
    lines = [list(source.listing()) for source in (one, two)]
    assert len(lines[0]) == 3 and lines[0] != lines[1]
    assert content.describe(one) != content.describe(two)


def test_names_that_are_no_utf_8_are_compared(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.pgm")
    with open(path, "wb") as file:
        file.write(b"P5 1 1 255 x")
    assert describe(tmp_path)["num_images"] == 1


def test_tfds_is_known_by_the_shards_of_its_split_wherever_it_lies(tfds_dir, tmp_path):
    (tmp_path / "cifar10").symlink_to(os.path.join(tfds_dir, "cifar10"))
    whole, moved, part = (
        data.open_source(f"tfds:cifar10:{split}", folder)
        for split, folder in (
            ("test", tfds_dir),
            ("test", str(tmp_path)),
            ("test[:100]", tfds_dir),
        )
    )
    assert [line.split()[0] for line in whole.listing()] == [b"test"]
    assert content.describe(moved) == content.describe(whole)
    said = difference(content.describe(whole), content.describe(part))
    assert f"{len(whole)} images then, 100 now" in said
