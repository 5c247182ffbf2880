"""Prepared data sets: made, resumed, checked, read; Open Images without ImageNet."""

import errno
import io
import json
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import psutil
import pytest
from PIL import Image

from atebm_jax import UserError, command_line, data, workdir_lock
from atebm_jax.data import openimages, prepare, prepared


@pytest.fixture
def folder(tmp_path):
    """Two classes of five images each, 20 by 30 pixels."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(5):
            pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
            path = tmp_path / "images" / name / f"{index}.png"
            Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def make(folder, to, **options):
    settings = {"size": 8, "shard_size": 3, "num_workers": 1}
    source = data.open_source(f"folder:{folder}")
    return prepare.prepare(source, to, **settings | options)


def test_prepared_set_has_the_labels_and_smaller_images(folder, tmp_path):
    index = make(folder, tmp_path / "set")
    source = data.open_source(f"prepared:{tmp_path / 'set'}")
    assert len(source) == index["num_images"] == 10 and source.num_classes == 2
    assert source.class_names == ("cat", "dog")
    assert [source[i]["label"] for i in range(10)] == [0] * 5 + [1] * 5
    image = Image.open(io.BytesIO(source[3]["image"]))
    assert image.size == (12, 8) and image.format == "JPEG"
    batches = data.eval_batches(
        source, preprocess="center_crop(8)", batch_size=4, image_shape=(8, 8, 3)
    )
    with batches as rows:
        assert sum(int(batch["mask"].sum()) for batch in rows) == 10


def test_prepared_set_is_read_from_a_folder_with_any_name(folder, tmp_path):
    to = tmp_path / "tea\n[0:3] *"
    make(folder, to)
    source = pickle.loads(pickle.dumps(data.open_source(f"prepared:{to}")))
    assert [source[i]["label"] for i in range(10)] == [0] * 5 + [1] * 5


def test_images_are_never_enlarged(folder, tmp_path):
    make(folder, tmp_path / "set", size=500)
    source = data.open_source(f"prepared:{tmp_path / 'set'}")
    assert Image.open(io.BytesIO(source[0]["image"])).size == (30, 20)


def test_finished_shards_are_kept(folder, tmp_path):
    make(folder, tmp_path / "set")
    kept = prepared.shard_paths(tmp_path / "set", 4)[0]
    before = kept.stat().st_mtime_ns
    lost = prepared.shard_paths(tmp_path / "set", 4)[2]
    content = lost.read_bytes()
    lost.with_name(lost.name + ".json").unlink()
    (tmp_path / "set" / prepared.INDEX).unlink()
    make(folder, tmp_path / "set")
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == content


def test_unreadable_images_are_listed_and_limited(folder, tmp_path):
    (folder / "cat" / "2.png").write_bytes(b"no image")
    index = make(folder, tmp_path / "set")
    assert (index["num_images"], index["num_bad_images"]) == (9, 1)
    assert "cat/2.png" in (tmp_path / "set" / "bad_images.txt").read_text()
    with pytest.raises(UserError, match=r"1 images .*0 are tolerated: .*cat/2\.png"):
        make(folder, tmp_path / "other", max_bad_images=0)


def test_image_longer_than_a_jpeg_may_be_is_an_unreadable_one(folder, tmp_path):
    Image.new("L", (66_000, 1)).save(folder / "cat" / "thin.png")
    assert make(folder, tmp_path / "set")["num_bad_images"] == 1
    listed = (tmp_path / "set" / "bad_images.txt").read_text()
    assert "thin.png: it has 66000 x 1 pixels, more than a JPEG" in listed


def test_end_of_a_worker_is_told_in_one_sentence():
    def killed():
        raise BrokenProcessPool

    with pytest.raises(UserError, match="want of memory: .* fewer --num_workers"):
        prepare._run([killed], num_workers=1, max_bad_images=0)


def test_set_is_not_written_among_the_images_it_is_made_of(folder):
    before = sorted(folder.rglob("*"))
    for to in (folder, folder / "set", folder / "cat" / ".." / "set"):
        with pytest.raises(UserError, match=f"--to={to} lies in {folder}"):
            prepare.main([f"--from=folder:{folder}", f"--to={to}"])
    assert sorted(folder.rglob("*")) == before


def test_images_of_a_damaged_shard_are_unreadable_ones(folder, tmp_path):
    make(folder, tmp_path / "set")
    source = data.open_source(f"prepared:{tmp_path / 'set'}")
    shard = prepared.shard_paths(tmp_path / "set", 4)[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    index = prepare.prepare(source, tmp_path / "other", size=8)
    assert index["num_images"] + index["num_bad_images"] == 10
    assert index["num_bad_images"] >= 3


def test_damaged_shard_is_found(folder, tmp_path):
    make(folder, tmp_path / "set")
    assert prepare.check(tmp_path / "set") == 10
    shard = prepared.shard_paths(tmp_path / "set", 4)[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(UserError, match="not as it was written"):
        prepare.check(tmp_path / "set")


def test_folder_of_other_settings_is_refused(folder, tmp_path):
    make(folder, tmp_path / "set")
    with pytest.raises(UserError, match="other settings"):
        make(folder, tmp_path / "set", size=9)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="is not empty"):
        make(folder, tmp_path / "full")


def stop_before(folder, to, shard, **options):
    """As if the command had been stopped before it wrote that shard."""
    make(folder, to, **options)
    records = prepared.shard_paths(to, 4)[shard]
    records.unlink()
    records.with_name(f"{records.name}.json").unlink()
    (to / prepared.INDEX).unlink()


def swap_classes(folder):
    (folder / "cat").rename(folder / "x")
    (folder / "dog").rename(folder / "cat")
    (folder / "x").rename(folder / "dog")


def one_image_less(folder):
    (folder / "dog" / "4.png").unlink()


def class_renamed(folder):
    (folder / "dog").rename(folder / "elk")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_classes, "10 images then and now, but not the same ones"),
        (one_image_less, "10 images then, 9 now"),
        (class_renamed, "class 1 was 'dog' then and is 'elk' now"),
    ],
)
def test_images_of_two_sets_do_not_mix(folder, tmp_path, change, message):
    to = tmp_path / "set"
    stop_before(folder, to, 2)
    before = {path.name: path.read_bytes() for path in to.iterdir()}
    change(folder)
    with pytest.raises(UserError, match=f"{message}.*give another --to"):
        make(folder, to)
    assert {path.name: path.read_bytes() for path in to.iterdir()} == before


def test_set_of_an_earlier_version_is_gone_on_with(folder, tmp_path):
    to = tmp_path / "set"
    stop_before(folder, to, 2)
    settings = json.loads((to / "settings.json").read_text())
    described = settings.pop("data")
    (to / "settings.json").write_text(json.dumps(settings))
    assert make(folder, to)["num_images"] == 10
    assert json.loads((to / "settings.json").read_text())["data"] == described


def test_other_settings_are_named(folder, tmp_path):
    make(folder, tmp_path / "set", indices=np.arange(4))
    for options, message in (
        ({"size": 9}, "size: 8 then, 9 now"),
        ({"indices": np.arange(3)}, "num_source_images: 4 then, 3 now"),
        ({"indices": np.arange(4)[::-1]}, "which of the images"),
    ):
        with pytest.raises(UserError, match=message):
            make(folder, tmp_path / "set", **{"indices": np.arange(4)} | options)


def test_one_command_writes_a_set_at_a_time(folder, tmp_path):
    to = tmp_path / "set"
    with workdir_lock.held(to, "--to"):
        with pytest.raises(UserError, match=r"in use by another job \(.*another --to"):
            make(folder, to)
        assert [path.name for path in to.iterdir()] == [workdir_lock.FILE]
    # What one that was killed has left keeps nobody out.
    (to / workdir_lock.FILE).write_text('{"pid": 1}')
    (to / ".settings.json.tmp").touch()
    assert make(folder, to)["num_images"] == 10
    assert not (to / workdir_lock.FILE).exists()


def test_workers_of_a_killed_command_give_the_folder_free(folder, tmp_path):
    # A pipe that nobody writes to keeps one worker busy.
    os.mkfifo(folder / "cat" / "9.png")
    to = tmp_path / "set"
    command = [sys.executable, "-m", "atebm_jax.data.prepare", "--num_workers=2"]
    command += [f"--from=folder:{folder}", f"--to={to}", "--shard_size=3"]
    command.append("--size=8")
    # Described before that, so that the command itself does not wait for the pipe.
    code = (
        "from atebm_jax.data import content, prepare; "
        "content.describe = lambda source: {'num_images': 11}; "
        "prepare.main(__import__('sys').argv[1:])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *command[3:]])
    while not list(to.glob("*.array_record.json")):
        assert process.poll() is None
        time.sleep(0.05)
    taken = pytest.raises(UserError, match="in use by another job")
    with taken, workdir_lock.held(to, "--to"):
        pass
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    with workdir_lock.held(to, "--to"):
        pass
    # They look now and then, and a loaded machine lets them seldom.
    assert not psutil.wait_procs(workers, timeout=60)[1]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_full_disk_is_told_and_with_room_the_set_is_made(
    folder, tmp_path, mounted, num_workers
):
    to, remount = mounted
    remount("size=60k")
    # The shards of 64 KiB each do not fit.
    with pytest.raises(UserError, match="cannot be written any more .No space left"):
        make(folder, to, size=500, quality=100, num_workers=num_workers)
    assert not [path for path in to.iterdir() if path.name.startswith(".")]
    remount("size=3m")
    index = make(folder, to, size=500, quality=100)
    assert index == make(folder, tmp_path / "whole", size=500, quality=100)


@pytest.mark.parametrize("name", ["settings.json", "bad_images.txt", prepared.INDEX])
def test_file_that_cannot_be_written_is_told_and_gone_on_with(
    folder, tmp_path, monkeypatch, name
):
    """As on a full disk, where none can be mounted."""
    write = pathlib.Path.write_bytes

    def full(path, text):
        write(path, text[: len(text) // 2])
        if name in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    to = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_bytes", full)
        with pytest.raises(UserError, match="cannot be written.*No space left"):
            prepare.prepare(data.open_source(f"folder:{folder}"), to, size=8)
    assert not list(to.glob(".*")) and not (to / prepared.INDEX).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--to"),
        (["--to=x"], "--from is missing"),
        (["--to=x", "--from=zip:y"], "unknown data source"),
        (["--to=nowhere", "--check"], "cannot be read"),
        (["--to=caf\udce9", "--check"], r"caf\\xe9 has bytes .* no UTF-8"),
        (["--to=x", "--from=openimages:y"], "needs --labels"),
        (["--to=x", "--size=big"], "argument --size: invalid int value: 'big'"),
        (["--to=x", "--from=digits:test", "--count=-1"], "--count is -1"),
        (["--to=x", "--from=digits:test", "--count=999"], "there are 359 images"),
        (["--to=x", "--from=digits:test", "--seed=-1"], "--seed -1"),
        (["--to=x", "--from=digits:test", "--num_workers=-1"], "num_workers -1"),
        (["--to=gs://x/y", "--from=digits:test"], "--to=gs://x/y is in a cloud"),
        (["--to=gs://x/y", "--check"], "--to=gs://x/y is in a cloud"),
    ],
)
def test_user_mistake_exits_with_2(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    with pytest.raises(SystemExit) as stopped:
        command_line.run(prepare.main, stopped="")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Bald Eagles", "bald eagle"),
        ("Dishes", "dish"),
        ("Glass", "glass"),
        ("T-shirt", "t shirt"),
    ],
)
def test_names_are_normalised(name, expected):
    assert openimages.normalise(name) == expected


def test_overlap_goes_by_names_and_hierarchy():
    display = {"a": "Tench", "b": "Fish", "c": "Sports car", "d": "Bus", "e": "Poetry"}
    classes = {"tench", "car", "school bus"}
    hierarchy = {
        "LabelName": "root",
        "Subcategory": [
            {"LabelName": "b", "Subcategory": [{"LabelName": "a"}]},
            {"LabelName": "e"},
        ],
    }
    found = openimages.overlapping_labels(display, classes, hierarchy)
    assert set(found) == {"a", "b", "c", "d"}


def test_images_of_open_images_without_overlap_are_chosen(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    labels = write(
        "labels.csv",
        "ImageID,Source,LabelName,Confidence\n"
        "1,v,/m/a,1\n1,v,/m/b,1\n2,v,/m/b,1\n3,v,/m/b,0\n4,v,/m/b,1\n4,v,/m/a,0\n",
    )
    names = write("names.csv", "LabelName,DisplayName\n/m/a,Tench\n/m/b,Poetry\n")
    classes = write("classes.txt", "n01440764 tench, Tinca tinca\n")
    decisions = tmp_path / "decisions.csv"
    chosen = openimages.select(labels, names, classes, None, decisions)
    assert chosen == {"2", "4"}
    assert "/m/a,Tench,is the class tench" in decisions.read_text()
    with pytest.raises(UserError, match="--labels=.* has the columns"):
        openimages.select(names, names, classes, None, decisions)
    with pytest.raises(UserError, match="--hierarchy=.* is no JSON"):
        openimages.select(labels, names, classes, names, decisions)


TABLES = {
    "labels": "ImageID,LabelName,Confidence\n1,/m/a,1\n2,/m/b,1\n",
    "names": "/m/a,Tench\n/m/b,Poetry\n",
    "classes": "tench\n",
    "hierarchy": '{"LabelName": "/m/r", "Subcategory": [{"LabelName": "/m/a"}]}',
}


def chosen_from(folder, encoding="utf-8", **texts):
    files = []
    for name, text in (TABLES | texts).items():
        (folder / name).write_text(text, encoding=encoding)
        files.append(str(folder / name))
    return openimages.select(*files, folder / "decisions.csv")


def test_byte_order_mark_is_no_part_of_a_table(tmp_path):
    assert chosen_from(tmp_path) == {"2"}
    assert chosen_from(tmp_path, encoding="utf-8-sig") == {"2"}


@pytest.mark.parametrize(
    "classes",
    [
        "0: tench\n",
        "{0: 'tench, Tinca tinca',\n 1: 'goldfish'}",
        "0\ttench",
        '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}',
        '{\n"0": [\n"n01440764",\n"tench"\n]}',
        "'n01440764': 'tench'",
        "0,n01440764,tench",
    ],
)
def test_classes_are_known_however_they_are_listed(tmp_path, classes):
    assert chosen_from(tmp_path, classes=classes) == {"2"}


def test_images_of_labels_without_a_name_are_left_out_and_that_is_said(
    tmp_path, caplog
):
    """Of a table of fewer labels, or with a blank behind one: it may be a tench."""
    labels = "3,/m/b,1\n3,/m/c,1\n4,/m/a ,1\n5,/m/c,0.9\n5,/m/b,1\n"
    assert chosen_from(tmp_path, labels=TABLES["labels"] + labels) == {"2", "5"}
    assert "2 labels that --class_descriptions does not name ('/m/a '" in caplog.text


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"labels": TABLES["labels"].replace("b,1", "b,yes")}, "line 3: .*'yes'"),
        ({"labels": TABLES["labels"].replace("b,1", "b,nan")}, "line 3: .*'nan'"),
        ({"labels": TABLES["labels"].replace("b,1", "b,1e400")}, "line 3: .*'1e400'"),
        ({"labels": TABLES["labels"].replace("b,1", "b,100")}, "number from 0 to 1"),
        ({"names": TABLES["names"].replace(",", ";")}, "descriptions=.* no names"),
        ({"hierarchy": "[" * 100_000}, "--hierarchy=.* is no JSON"),
        ({"labels": f"{TABLES['labels']}{'x' * 200_000}"}, "--labels=.* is no table"),
        ({"labels": ""}, "--labels=.* has the columns None"),
        ({"names": "x" * 200_000}, "--class_descriptions=.* is no table"),
        ({"hierarchy": "["}, "--hierarchy=.* is no JSON"),
        ({"hierarchy": "[1]"}, "--hierarchy=.* is no hierarchy"),
        ({"hierarchy": '{"Subcategory": [{}]}'}, "--hierarchy=.* is no hierarchy"),
        ({"hierarchy": '{"Subcategory": 3}'}, "--hierarchy=.* is no hierarchy"),
    ],
)
def test_damaged_table_is_told_in_one_sentence(tmp_path, texts, message):
    with pytest.raises(UserError, match=message):
        chosen_from(tmp_path, **texts)


def test_table_of_another_encoding_is_told_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        chosen_from(tmp_path, encoding="utf-16")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"format": 0}, "of another format"),
        ([], "of another format"),
        ({"format": 1}, "not as it was written"),
        ({"shards": 2}, "not as it was written"),
        ({"shards": [{"num_images": 1}]}, "not as it was written"),
        ({"class_names": "ab"}, "not as it was written"),
    ],
)
def test_index_of_another_format_is_refused(tmp_path, index, message):
    if isinstance(index, dict) and "format" not in index:
        index = {
            "format": 1,
            "class_names": None,
            "shards": [],
            "num_images": 0,
        } | index
    (tmp_path / prepared.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        data.open_source(f"prepared:{tmp_path}")


def test_command_starts_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "atebm_jax.data.prepare"]
    command += [f"--from=folder:{tmp_path}/nowhere", f"--to={tmp_path}/out"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "nowhere" in done.stderr and "Traceback" not in done.stderr
