"""Prepared data sets: made, resumed, checked, read; Open Images without ImageNet."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from atebm_jax import UserError, data
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


def test_images_are_never_enlarged(folder, tmp_path):
    make(folder, tmp_path / "set", size=500)
    source = data.open_source(f"prepared:{tmp_path / 'set'}")
    assert Image.open(io.BytesIO(source[0]["image"])).size == (30, 20)


def test_finished_shards_are_kept(folder, tmp_path):
    make(folder, tmp_path / "set")
    kept = tmp_path / "set" / prepared.shard_name(0, 4)
    before = kept.stat().st_mtime_ns
    lost = tmp_path / "set" / prepared.shard_name(2, 4)
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
    with pytest.raises(UserError, match="1 images cannot be read"):
        make(folder, tmp_path / "other", max_bad_images=0)


def test_damaged_shard_is_found(folder, tmp_path):
    make(folder, tmp_path / "set")
    assert prepare.check(tmp_path / "set") == 10
    shard = tmp_path / "set" / prepared.shard_name(1, 4)
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--to is missing"),
        (["--to=x"], "--from is missing"),
        (["--to=x", "--from=zip:y"], "unknown data source"),
        (["--to=nowhere", "--check"], "cannot be read"),
        (["--to=x", "--from=openimages:y"], "needs --labels"),
        (["--to=x", "--size=big"], "size"),
    ],
)
def test_user_mistake_exits_with_2(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare", *arguments])
    before = flagsaver.save_flag_values(prepare._FLAGS)
    try:
        with pytest.raises(SystemExit) as stopped:
            prepare.main(prepare._parse(["prepare", *arguments]))
    finally:
        flagsaver.restore_flag_values(before, prepare._FLAGS)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


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
    ("texts", "message"),
    [
        ({"labels": TABLES["labels"].replace("b,1", "b,yes")}, "line 3: .*'yes'"),
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


def test_index_of_another_format_is_refused(tmp_path):
    (tmp_path / prepared.INDEX).write_text(json.dumps({"format": 0}))
    with pytest.raises(UserError, match="of another format"):
        data.open_source(f"prepared:{tmp_path}")


def test_command_starts_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "atebm_jax.data.prepare"]
    command += [f"--from=folder:{tmp_path}/nowhere", f"--to={tmp_path}/out"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "nowhere" in done.stderr and "Traceback" not in done.stderr
