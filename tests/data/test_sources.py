import errno
import io
import os
import pickle
import sys
import tarfile

import numpy as np
import pytest

from atebm_jax.data import ArraySource, decode, open_source
from atebm_jax.data.tfds import parse_tfds_spec
from atebm_jax.errors import UserError


def test_digits_hold_out_a_fifth_of_each_class():
    train, test = open_source("digits:train"), open_source("digits:test")
    assert len(train) + len(test) == 1797
    assert train.num_classes == test.num_classes == 10
    for label in range(10):
        held_out = sum(test[i]["label"] == label for i in range(len(test)))
        rest = sum(train[i]["label"] == label for i in range(len(train)))
        assert held_out == round((held_out + rest) / 5)
    image = test[0]["image"]
    assert image.shape == (8, 8, 1) and image.dtype == np.uint8
    assert max(train[i]["image"].max() for i in range(20)) == 255


def test_digits_are_split_alike_each_time():
    first, second = open_source("digits:test"), open_source("digits:test")
    assert all(
        np.array_equal(first[i]["image"], second[i]["image"]) for i in range(len(first))
    )


@pytest.mark.parametrize(
    "spec, message",
    [
        ("cifar10", "unknown data source 'cifar10': choose one of digits:train, "),
        ("", "unknown data source '': choose one of digits:train, "),
        ("digits:validation", "digits:train or digits:test"),
        ("folder:", "no such folder"),
        ("folder:/nowhere", "no such folder"),
        ("tfds:cifar10", "tfds:NAME:SPLIT"),
        ("tfds:cifar10:test[10", "tfds:NAME:SPLIT"),
    ],
)
def test_wrong_specs_are_explained(spec, message):
    with pytest.raises(UserError, match=message):
        open_source(spec)


@pytest.mark.parametrize(
    "spec, name, split",
    [
        ("tfds:cifar10:train", "cifar10", "train"),
        ("tfds:cifar10:test[10:20]", "cifar10", "test[10:20]"),
        ("tfds:cifar10:3.0.2:test[:20]", "cifar10:3.0.2", "test[:20]"),
        ("tfds:imagenet_v2/topimages:test", "imagenet_v2/topimages", "test"),
        ("tfds:a:train[:10%]+test", "a", "train[:10%]+test"),
    ],
)
def test_tfds_specs_are_split_outside_of_brackets(spec, name, split):
    assert parse_tfds_spec(spec) == (name, split)


def test_tfds_reads_encoded_images_and_labels(tfds_dir):
    source = open_source("tfds:cifar10:test[10:30]", tfds_dir)
    whole = open_source("tfds:cifar10:test", tfds_dir)
    assert len(source) == 20 and len(whole) == 10_000
    assert source.num_classes == 10 and source.class_names[3] == "cat"
    assert source[0] == whole[10]
    assert isinstance(source[0]["image"], bytes)
    assert decode(source[0]["image"], 3).shape == (32, 32, 3)
    assert source.describe(4) == "tfds:cifar10:test[10:30][4]"


def test_tfds_needs_no_tensorflow(tfds_dir):
    before = "tensorflow" in sys.modules
    open_source("tfds:cifar10:test[:2]", tfds_dir)[0]
    assert ("tensorflow" in sys.modules) == before


def test_tfds_source_is_reopened_after_pickling(tfds_dir):
    source = open_source("tfds:cifar10:test[:5]", tfds_dir)
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == 5 and copy[2] == source[2]


def test_tfds_names_a_version(tfds_dir):
    assert len(open_source("tfds:cifar10:3.0.2:test", tfds_dir)) == 10_000
    with pytest.raises(UserError, match="version '9.9.9'.*3.0.2"):
        open_source("tfds:cifar10:9.9.9:test", tfds_dir)


def test_missing_tfds_data_set_tells_what_is_there(tfds_dir):
    with pytest.raises(UserError, match="no data set 'svhn'.*cifar10.*tfds build"):
        open_source("tfds:svhn:test", tfds_dir)


@pytest.mark.parametrize("split", ["validation", "test[:99999]"])
def test_missing_tfds_split_tells_what_is_there(tfds_dir, split):
    with pytest.raises(UserError, match=r"no split.*test \(10000 images\)"):
        open_source(f"tfds:cifar10:{split}", tfds_dir)


def cifar_archive(path, num_classes, coarse=b""):
    """An archive as CIFAR's authors publish it: 6 + 2 images, pixel values 0, 1, ..."""
    names = "".join(f"class {k}\n" for k in range(num_classes)) + "\n"
    rows = [
        coarse + bytes([i]) + bytes([i] * 1024 + [i + 1] * 1024 + [i + 2] * 1024)
        for i in range(8)
    ]
    if num_classes == 10:
        files = {"data_batch_2.bin": rows[3:6], "data_batch_1.bin": rows[:3]}
        files |= {"test_batch.bin": rows[6:]}
        files = {"batches.meta.txt": [names.encode()], **files}
    else:
        files = {"train.bin": rows[:6], "test.bin": rows[6:]}
        files |= {"coarse_label_names.txt": [b"a\nb\n"]}
        files |= {"fine_label_names.txt": [names.encode()]}
    with tarfile.open(path, "w:gz") as archive:
        for name, parts in files.items():
            content = b"".join(parts)
            member = tarfile.TarInfo(f"cifar-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("num_classes, coarse", [(10, b""), (100, b"\x07")])
def test_authors_archives_of_cifar_are_read_as_they_are(tmp_path, num_classes, coarse):
    path = cifar_archive(tmp_path / "cifar.tar.gz", num_classes, coarse)
    train = open_source(f"cifar:{path}:train")
    assert len(train) == 6 and train.num_classes == num_classes
    assert train.class_names[7] == "class 7"
    example = train[4]
    assert example["label"] == 4 and example["image"].shape == (32, 32, 3)
    np.testing.assert_array_equal(example["image"][5, 9], [4, 5, 6])
    test = open_source(f"cifar:{path}:test")
    assert [test[i]["label"] for i in range(len(test))] == [6, 7]


def test_other_archives_and_splits_of_cifar_are_explained(tmp_path):
    path = cifar_archive(tmp_path / "cifar.tar.gz", 10)
    with pytest.raises(UserError, match="cifar:PATH:train or cifar:PATH:test"):
        open_source(f"cifar:{path}")
    with pytest.raises(UserError, match="cannot be read"):
        open_source("cifar:/nowhere/cifar-10-binary.tar.gz:train")
    (tmp_path / "half.tar.gz").write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="cannot be read"):
        open_source(f"cifar:{tmp_path / 'half.tar.gz'}:train")
    with tarfile.open(tmp_path / "python.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("cifar-10-batches-py/data_batch_1"))
    with pytest.raises(UserError, match="no binary version of CIFAR"):
        open_source(f"cifar:{tmp_path / 'python.tar.gz'}:train")


def test_damaged_archives_of_cifar_are_read_whole_or_refused(tmp_path):
    whole = cifar_archive(tmp_path / "cifar.tar.gz", 10).read_bytes()
    path = tmp_path / "damaged.tar.gz"
    refused = 0
    for k in range(len(whole)):
        path.write_bytes(whole[:k] + bytes([whole[k] ^ 1 << k % 8]) + whole[k + 1 :])
        try:
            train = open_source(f"cifar:{path}:train")
        except UserError:
            refused += 1
            continue
        assert [train[i]["image"][0, 0, 0] for i in range(len(train))] == [*range(6)]
    # All but the date and the name in gzip's own head.
    assert refused > 0.9 * len(whole)


def test_missing_tfds_folder_is_explained(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_source("tfds:cifar10:train", str(tmp_path / "absent"))
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    with pytest.raises(UserError, match="no prepared version.*3.0.2"):
        open_source("tfds:cifar10:train", str(tmp_path))


def test_class_folders_are_labelled_in_order_of_name(tmp_path, encode, image):
    for path in ("cat/2.JPG", "cat/1.png", "ant/deep/er/3.jpeg", ".hidden/4.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(encode(image, "PNG"))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    source = open_source(f"folder:{tmp_path}")
    assert source.class_names == ("ant", "cat") and source.num_classes == 2
    assert [source[i]["label"] for i in range(len(source))] == [0, 1, 1]
    names = [source.describe(i) for i in range(3)]
    expected = ("ant/deep/er/3.jpeg", "cat/1.png", "cat/2.JPG")
    assert names == [str(tmp_path / path) for path in expected]
    np.testing.assert_array_equal(decode(source[1]["image"], 3), image)


def put(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_every_ending_that_is_decoded_is_read_and_others_are_said(
    tmp_path, encode, image, caplog
):
    known = ("jfif", "jpe", "JPG", "pgm", "pbm", "pnm", "apng", "mpo", "avif", "jp2")
    for ending in known:
        put(tmp_path / "cat" / f"a.{ending}", encode(image, "PNG"))
    for ending in ("eps", "ps", "pdf", "wmf", "psd", "txt", "db", "mp4"):
        put(tmp_path / "cat" / f"b.{ending}")
    put(tmp_path / "cat" / "README")
    put(tmp_path / "cat" / ".hidden.txt")
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    source = open_source(f"folder:{tmp_path}")
    assert len(source) == len(known)
    assert "10 files and folders that are no images are passed over" in caplog.text
    assert ".pdf: 1" in caplog.text or "more kinds" in caplog.text


def test_folders_of_systems_are_no_classes(tmp_path, encode, image, caplog):
    for name in ("ant", "@eaDir", "__MACOSX", "ant/@eaDir", ".git", "bee"):
        put(tmp_path / name / "a.png", encode(image, "PNG"))
    for name in ("@Recycle", "#snapshot", "bee/$RECYCLE.BIN", "Temporary Items"):
        put(tmp_path / name / "a.png", encode(image, "PNG"))
    source = open_source(f"folder:{tmp_path}")
    assert source.class_names == ("ant", "bee") and len(source) == 2
    assert "folder @eaDir: 2" in caplog.text and "folder __MACOSX: 1" in caplog.text


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("1", "2", "10"), "class 1 is the folder 10. Leading zeros (1) keep"),
        (("-1", "0", "1", "2", "10"), "class 3 is the folder 10."),
        (("0.5", "2", "10.25"), "class 1 is the folder 10.25."),
        (("01", "02", "10"), ""),
        (("0", "1", "2"), ""),
        (("1", "10", "2a"), ""),
    ],
)
def test_numbers_as_classes_out_of_their_order_are_said_in_a_line(
    tmp_path, encode, image, caplog, names, said
):
    for name in names:
        put(tmp_path / name / "a.png", encode(image, "PNG"))
    open_source(f"folder:{tmp_path}")
    assert len(caplog.records) == bool(said) and said in caplog.text


def test_links_that_lead_above_themselves_are_passed_over(
    tmp_path, encode, image, caplog
):
    root = tmp_path / "root"
    put(root / "ant" / "deep" / "a.png", encode(image, "PNG"))
    put(tmp_path / "elsewhere" / "b.png", encode(image, "PNG"))
    (root / "bee").symlink_to(tmp_path / "elsewhere")
    (root / "bee" / "to_bee").symlink_to(root / "bee")
    (root / "all").symlink_to(root)
    (root / "ant" / "deep" / "up").symlink_to("..")
    (root / "ant" / "to_bee").symlink_to(root / "bee")
    (root / "ant" / "self").symlink_to("self")
    source = open_source(f"folder:{root}")
    assert source.class_names == ("ant", "bee")
    assert [source[i]["label"] for i in range(len(source))] == [0, 0, 1]
    assert "to above it" in caplog.text


def test_folder_that_cannot_be_read_is_named(tmp_path, encode, image, monkeypatch):
    for name in ("ant", "bee"):
        put(tmp_path / name / "a.png", encode(image, "PNG"))
    scan = os.scandir

    def refuse(path):
        if os.path.basename(path.rstrip("/")) == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for closed in ("bee", tmp_path.name):
        with pytest.raises(UserError, match=f"{closed}.? cannot be read .Permission"):
            open_source(f"folder:{tmp_path}")


def test_folder_of_data_sets_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "cifar10").mkdir()

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match="cifar10 cannot be read .Permission"):
        open_source("tfds:cifar10:test", str(tmp_path))
    with pytest.raises(UserError, match="no data set 'svhn'.*cannot be read: Permis"):
        open_source("tfds:svhn:test", str(tmp_path))


def test_names_of_arrays_classes_are_in_letters():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    source = ArraySource(images, [0, 1], class_names=["caf\udce9", 7])
    assert source.class_names == ("caf\\xe9", "7")


@pytest.mark.parametrize(
    ("numbers", "said"),
    [(range(1, 11), True), (range(10), False), (["01", "2"], False)],
)
def test_numbers_in_the_order_of_letters_are_said(
    tmp_path, encode, image, caplog, numbers, said
):
    for number in numbers:
        put(tmp_path / str(number) / "a.png", encode(image, "PNG"))
    open_source(f"folder:{tmp_path}")
    assert ("class 1 is the folder 10" in caplog.text) == said


def test_names_that_are_no_utf8_are_escaped_where_they_are_shown(
    tmp_path, encode, image
):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(folder)
    for name in (b"th\xe9.png", "tea\n\u00e9.png".encode()):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(encode(image, "PNG"))
    source = open_source(f"folder:{tmp_path}")
    assert source.class_names == ("caf\\xe9",)
    shown = [source.describe(i).rpartition("/")[2] for i in range(2)]
    assert shown == ["tea\\n\u00e9.png", "th\\xe9.png"]
    for i in range(2):
        np.testing.assert_array_equal(decode(source[i]["image"], 3), image)
    whole = open_source("folder:" + os.fsdecode(folder))
    assert len(whole) == 2 and whole.spec.endswith("caf\\xe9")


def test_accents_of_class_folders_are_composed(tmp_path, encode, image):
    """As of a folder that was packed under macOS: it looks alike, and is the same."""
    for place, name in (("here", "caf\u00e9"), ("there", "cafe\u0301")):
        (tmp_path / place / name).mkdir(parents=True)
        (tmp_path / place / name / "x.png").write_bytes(encode(image, "PNG"))
        source = open_source(f"folder:{tmp_path / place}")
        assert source.class_names == ("caf\u00e9",) and len(source) == 1
        np.testing.assert_array_equal(decode(source[0]["image"], 3), image)


def test_flat_folder_is_unlabelled(flat_folder):
    source = open_source(f"folder:{flat_folder(3)}")
    assert len(source) == 3
    assert source.num_classes is None and source.class_names is None
    assert source[2]["label"] == -1 and decode(source[2]["image"], 3)[0, 0, 0] == 10


def test_folder_without_images_is_explained(tmp_path):
    with pytest.raises(UserError, match="no images found"):
        open_source(f"folder:{tmp_path}")


def test_empty_class_folder_is_named(tmp_path, encode, image):
    for name in ("full", "vacant"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "1.png").write_bytes(encode(image, "PNG"))
    with pytest.raises(UserError, match="vacant"):
        open_source(f"folder:{tmp_path}")


def test_images_beside_class_folders_are_refused(flat_folder):
    root = flat_folder(1)
    (root / "cat").mkdir()
    with pytest.raises(UserError, match=r"000\.png.*cat"):
        open_source(f"folder:{root}")


def test_array_source_returns_what_it_was_given():
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    source = ArraySource(images, [2, 0], spec="mine")
    assert len(source) == 2 and source.num_classes == 3
    assert source[0]["label"] == 2 and source.describe(1) == "mine[1]"
    np.testing.assert_array_equal(source[1]["image"], images[1])
    assert ArraySource(images).num_classes is None


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (np.zeros((2, 4, 4, 3), np.float32), None, "uint8"),
        (np.zeros((2, 4, 4), np.uint8), None, "N, H, W, C"),
        (np.zeros((2, 3, 4, 4), np.uint8), None, "C = 1 or 3"),
        (np.zeros((0, 4, 4, 3), np.uint8), None, "no images"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0], r"shape \[2\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0.0, 1.0], "integers"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, -1], "0..0"),
    ],
)
def test_wrong_arrays_are_explained(images, labels, message):
    with pytest.raises(UserError, match=message):
        ArraySource(images, labels)
