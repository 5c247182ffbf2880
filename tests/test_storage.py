"""Files that are whole or absent."""

import contextlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from atebm_jax import UserError, storage
from atebm_jax.local_path import is_device


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_is_replaced_whole(tmp_path):
    path = epath.Path(tmp_path) / "report.json"
    storage.replace_text(path, "old")
    storage.replace_text(path, "new")
    assert path.read_text() == "new"
    assert names_in(tmp_path) == ["report.json"]


def test_names_that_are_no_utf8_are_escaped_in_reports(tmp_path):
    storage.replace_text(epath.Path(tmp_path) / "report.md", "caf\udce9, caf\u00e9")
    text = (tmp_path / "report.md").read_bytes().decode()
    assert text == "caf\\xe9, caf\u00e9"


def test_pipe_is_written_through_and_stays(tmp_path):
    """As /dev/null and /dev/stdout, which a file must not take the place of."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    storage.replace_text(epath.Path(pipe), "figures")
    assert os.read(reader, 99) == b"figures"
    os.close(reader)
    assert is_device(pipe) and os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_interrupted_writing_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "units.npz"
    storage.write_npz(path, {"x": np.arange(3)})

    class Broken:
        def __array__(self, *args, **options):
            raise error

    with pytest.raises(type(error)):
        storage.write_npz(path, {"x": np.arange(4), "y": Broken()})
    assert names_in(tmp_path) == ["units.npz"]
    assert np.load(path)["x"].tolist() == [0, 1, 2]


def test_number_that_json_does_not_know_is_refused_where_others_read_it(tmp_path):
    path = tmp_path / "report.json"
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json(path, {"distance": np.inf}, allow_nan=False)
    assert names_in(tmp_path) == []
    storage.write_json(path, {"distance": np.inf})
    assert path.read_text() == '{\n  "distance": Infinity\n}\n'


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    storage.replace_text(pipe, "figures")
    assert os.read(reader, 100) == b"figures"
    os.close(reader)
    assert pipe.is_fifo() and names_in(tmp_path) == ["pipe"]


def test_several_processes_may_make_the_same_file(tmp_path, monkeypatch):
    path = tmp_path / "shard"
    with storage.replacing(path, shared=True) as mine:
        mine.write_text("the same")
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with storage.replacing(path, shared=True) as other:
            assert other != mine
            other.write_text("the same")
        assert names_in(tmp_path) == sorted([mine.name, "shard"])
    assert names_in(tmp_path) == ["shard"] and path.read_text() == "the same"


def test_folder_appears_whole_in_place_of_an_empty_one(tmp_path):
    place = tmp_path / "[new]" / "set"
    for _ in range(2):
        with storage.appears_whole(place) as made:
            Path(made).mkdir()
            (Path(made) / "x").write_text("1")
            assert not place.exists() or not names_in(place)
        assert names_in(place) == ["x"] and names_in(place.parent) == ["set"]
        (place / "x").unlink()


def test_what_a_killed_process_has_left_does_not_appear(tmp_path):
    left = tmp_path / f".set.{os.getpid()}.tmp"
    left.mkdir()
    (left / "half").touch()
    with storage.appears_whole(tmp_path / "set") as made:
        Path(made).mkdir()
    assert names_in(tmp_path) == ["set"] and not names_in(tmp_path / "set")


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyError("x")])
def test_folder_that_could_not_be_made_leaves_nothing_behind(tmp_path, error):
    told = UserError if isinstance(error, OSError) else KeyError
    with (
        pytest.raises(told, match="cannot be written .No space left|x"),
        storage.appears_whole(tmp_path / "a" / "b" / "set") as made,
    ):
        Path(made).mkdir()
        (Path(made) / "half").touch()
        raise error
    assert names_in(tmp_path) == []


def test_what_cannot_be_written_is_told_with_its_remedy(tmp_path):
    for what, remedy in (("folder x", ""), (tmp_path, "Make room.")):
        with pytest.raises(UserError) as told, storage.writing(what, remedy):
            raise OSError("full")
        assert str(told.value) == f"{what} cannot be written: full. {remedy}".rstrip()


def test_arrays_are_read_whole_or_not_at_all(tmp_path):
    """However a file is damaged: numpy and zip have many ways to say so."""
    path = epath.Path(tmp_path) / "arrays.npz"
    arrays = {"mean": np.arange(6.0), "name": np.asarray("abc")}
    storage.write_npz(path, arrays)
    whole = path.read_bytes()
    assert list(storage.read_npz(path)) == ["mean", "name"]
    assert list(storage.read_npz(path, ["name"])) == ["name"]
    with pytest.raises(OSError, match="KeyError"):
        storage.read_npz(path, ["sigma"])
    array = io.BytesIO()
    np.save(array, arrays["mean"])
    damaged = [array.getvalue(), *(whole[:k] for k in range(0, len(whole), 7))]
    for k in range(len(whole)):
        damaged.append(whole[:k] + bytes([whole[k] ^ 1 << k % 8]) + whole[k + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with contextlib.suppress(OSError):
            found = storage.read_npz(path)
            if found.keys() == arrays.keys():
                np.testing.assert_array_equal(found["mean"], arrays["mean"])
