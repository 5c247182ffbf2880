"""A workdir in a bucket: everything goes through the path library, nothing appends.

The bucket is fsspec's file system in memory, put where `gs://` finds its own. Arrays
of checkpoints are left out: Orbax writes them by itself.
"""

import ast
import json
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import tensorboardX
import tiny
from etils import epath
from etils.epath import backend

from atebm_jax import (
    UserError,
    checkpoint,
    checksums,
    intact,
    job,
    pictures,
    storage,
    workdir_lock,
)
from atebm_jax.evaluate import report
from atebm_jax.evaluate.store import Store
from atebm_jax.metric_writer import MetricWriter, read_metrics

PACKAGE = Path(__file__).parents[1] / "atebm_jax"


class Events:
    """Stands in for the writer of event files, which has a client of its own."""

    def __init__(self, folder, **options):
        self.folder = folder

    def add_scalar(self, name, value, step):
        pass

    def flush(self):
        pass

    def close(self):
        pass


class Stopping:
    """Stands in for a command that is stopped while it writes."""

    def __array__(self, *args, **options):
        raise KeyboardInterrupt


class Unlocked:
    """Stands in for a lock that is free."""

    def acquire(self):
        pass


class Bucket(fsspec.get_filesystem_class("memory")):
    """Objects can be written whole, and never appended to."""

    protocol = "gs"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def _open(self, path, mode="rb", **options):
        assert "a" not in mode, f"{path} is appended to"
        return super()._open(path, mode=mode, **options)


@pytest.fixture
def workdir(monkeypatch):
    bucket = Bucket()
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: bucket)
    monkeypatch.setattr(tensorboardX, "SummaryWriter", Events)
    monkeypatch.setattr(storage, "_found", lambda module: True)
    return epath.Path("gs://bucket/run")


def test_config_is_claimed_and_another_one_refused(workdir):
    settings = tiny.config()
    lock = Unlocked()
    for _ in range(2):
        job._check_config(workdir, settings)
        job._claim(workdir, settings, {"train": {"num_images": 7}}, lock)
    assert json.loads((workdir / "config.json").read_text())["seed"] == 0
    assert json.loads((workdir / "data.json").read_text())["train"]["num_images"] == 7
    with pytest.raises(UserError, match="seed: 0 before, 1 now"):
        job._check_config(workdir, tiny.config(seed=1))


def test_metrics_are_there_at_every_checkpoint_and_at_the_end(workdir):
    writer = MetricWriter(workdir)
    writer.rewind("stage1", 0)
    for step in (1, 2, 3):
        writer.write("stage1", step, {"loss": 0.5})
    # The first line went at once, the others wait for their time.
    assert [r["step"] for r in read_metrics(workdir)] == [1]
    writer.flush()
    assert [r["step"] for r in read_metrics(workdir)] == [1, 2, 3]
    writer.write("stage1", 4, {"loss": 0.5})
    writer.close()
    assert [r["step"] for r in read_metrics(workdir)] == [1, 2, 3, 4]


def test_metrics_after_the_restored_step_are_cut_away(workdir):
    writer = MetricWriter(workdir)
    writer.rewind("stage1", 0)
    for step in (1, 2, 3):
        writer.write("stage1", step, {"loss": 0.5})
    writer.rewind("stage1", 1)
    writer.write("stage1", 2, {"loss": 0.25})
    writer.close()
    again = MetricWriter(workdir)
    again.rewind("stage1", 2)
    again.write("stage1", 3, {"loss": 0.125})
    again.close()
    losses = [record["loss"] for record in read_metrics(workdir)]
    assert losses == [0.5, 0.25, 0.125]


def test_pictures_reports_and_units_are_written(workdir):
    images = np.zeros((4, 8, 8, 1), np.float32)
    pictures.sample_grid(
        workdir / "samples.png",
        {"samples": (images, np.arange(4))},
        num_classes=4,
        num_rows=1,
        class_names=None,
    )
    assert (workdir / "samples.png").read_bytes().startswith(b"\x89PNG")
    store = Store(workdir / "units", {"a": 1})
    store.save("000000", {"x": np.arange(3)})
    assert store.load("000000")["x"].tolist() == [0, 1, 2]
    with pytest.raises(KeyboardInterrupt):
        store.save("000000", {"x": np.arange(9), "y": Stopping()})
    assert store.load("000000")["x"].tolist() == [0, 1, 2]
    report.write_stages(workdir, {"stages": {}})
    assert json.loads((workdir / "report.json").read_text()) == {"stages": {}}
    assert checkpoint.steps_in(checkpoint.stage_folder(workdir, "stage1")) == []


def step_in(workdir, step, committed=True):
    """A step's folder as Orbax leaves it in a bucket, of two small files."""
    folder = checkpoint.stage_folder(workdir, "stage1") / str(step)
    for name in ("state/d/0", "meta/metadata"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    checksums.write(folder)
    if committed:
        (folder / "commit_success.txt").write_text("yes")
    return folder


def test_step_counts_once_it_is_committed_and_half_ones_are_removed(workdir):
    step_in(workdir, 2)
    step_in(workdir, 4, committed=False)
    folder = checkpoint.stage_folder(workdir, "stage1")
    assert checkpoint.steps_in(folder) == [2]
    checkpoint._remove_leftovers(folder)
    assert [path.name for path in folder.iterdir()] == ["2"]


def test_checksums_are_written_before_the_commit(workdir):
    folder = step_in(workdir, 2, committed=False)
    (folder / checksums.FILE).unlink()
    (folder / "state" / "manifest.ocdbt").write_text("")
    checkpoint._write_checksums(folder.parent)
    assert checksums.exist(folder) and checksums.damage(folder) is None


def test_damaged_step_is_stepped_over_and_moved_away(workdir):
    good, bad = step_in(workdir, 2), step_in(workdir, 4)
    (bad / "state/d/0").write_text("")
    step, damaged = intact.newest(good.parent)
    assert (step, damaged) == (2, {4: "state/d/0 is empty"})
    intact._move(bad, good.parent / "4.damaged")
    assert checkpoint.steps_in(good.parent) == [2]
    assert (good.parent / "4.damaged" / "state" / "d" / "0").exists()


def test_workdir_is_held_by_a_sign_of_life(workdir, monkeypatch):
    for name in ("_BEAT", "_LOOK_EVERY"):
        monkeypatch.setattr(workdir_lock, name, 0.05)
    (workdir / "config.json").write_text("{}")
    first, second = (workdir_lock.Lock(workdir) for _ in range(2))
    first.acquire()
    with pytest.raises(UserError, match="in use by another job"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_missing_packages_are_named(workdir, monkeypatch):
    monkeypatch.setattr(storage, "_found", lambda module: module == "gcsfs")
    with pytest.raises(UserError, match="google-cloud-storage is not .*jax.gcs"):
        tiny.run(tiny.config(), workdir)
    monkeypatch.setattr(storage, "_found", lambda module: True)
    assert storage.reached(workdir) == workdir
    assert storage.reached("/a/b") == epath.Path("/a/b")


@pytest.mark.parametrize(
    "path",
    [
        *(PACKAGE / name for name in ("job.py", "train.py", "storage.py")),
        *(PACKAGE / name for name in ("metric_writer.py", "pictures.py")),
        *(PACKAGE / name for name in ("checkpoint.py", "checksums.py", "intact.py")),
        *sorted((PACKAGE / "evaluate").glob("*.py")),
    ],
    ids=lambda path: path.name,
)
def test_files_of_a_workdir_are_reached_by_the_path_library_alone(path):
    """No built-in open, no os.path and no pathlib, which know local files only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "open", f"{path}:{node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("os", "path"), f"{path}:{node.lineno}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {getattr(node, "module", None), *(n.name for n in node.names)}
            assert not names & {"pathlib", "os.path", "shutil", "glob"}, path
