"""What fails under a running job: one sentence, nothing lost, the same end later."""

import errno
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import tiny
from etils import epath
from PIL import Image

import atebm_jax
from atebm_jax import UserError, checkpoint, checksums, data, intact, storage
from atebm_jax.metric_writer import MetricWriter, read_metrics

sys.path.insert(0, str(Path(__file__).parent / "faults"))

import jobs

FEW = {
    # Large enough for a disk that gets full.
    "model.widen_factor": 8,
    "evaluate.num_examples": 16,
    "evaluate.num_test_examples": 16,
    "evaluate.samples.num": 10,
    "evaluate.samples.num_test": 10,
    "evaluate.samples.num_steps": 1,
}


def settings(**overrides):
    return tiny.config(stages="stage1", **(FEW | overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a job that nothing has disturbed; 4 and 6 its last steps."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    tiny.run(settings(), workdir)
    return workdir


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def assert_same_end(workdir, finished):
    folders = [checkpoint.stage_folder(w, "stage1") for w in (workdir, finished)]
    assert checkpoint.steps_in(folders[0])[-1] == 6
    weights = [checkpoint.load_weights(folder)[0] for folder in folders]
    reference.assert_same_bits(*weights)
    timed = "images_per_second"
    first, second = (
        [{k: v for k, v in r.items() if k != timed} for r in read_metrics(w)]
        for w in (workdir, finished)
    )
    assert first == second


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def largest_file(step):
    files = [path for path in (step / "state").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


# --- Damaged checkpoints --------------------------------------------------------------


def test_every_file_of_a_step_is_watched(copy):
    """Truncated, empty or flipped in turn: named, whichever file it is."""
    step = copy / "checkpoints" / "stage1" / "6"
    names = {str(p.relative_to(step)) for p in step.rglob("*") if p.is_file()}
    # Written after the list; what a step holds is read without these.
    names -= {"_CHECKPOINT_METADATA", "commit_success.txt"}
    assert len(names) > 10
    for number, name in enumerate(sorted(names)):
        content = (step / name).read_bytes()
        if not content:
            continue
        flipped = content[:-1] + bytes([content[-1] ^ 128])
        (step / name).write_bytes((content[:-1], b"", flipped)[number % 3])
        with pytest.raises(UserError, match=f"/6 is damaged: {name} "):
            checkpoint.load_weights(step)
        (step / name).write_bytes(content)
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
        (step / name).write_bytes(b"")
    checkpoint.load_weights(step)


def test_job_goes_on_from_the_step_before_a_damaged_one(copy, finished):
    step = copy / "checkpoints" / "stage1" / "6"
    victim = largest_file(step)
    flip(victim)
    _, printed = tiny.run(settings(), copy)
    name = victim.relative_to(step)
    assert f"{step} is damaged: {name} was truncated or altered" in printed
    assert "It lies in 6.damaged now; going on from step 4." in printed
    assert_same_end(copy, finished)
    # For whoever wants to look, and in nobody's way.
    assert (step.parent / "6.damaged").is_dir()
    assert 6 in checkpoint.steps_in(epath.Path(step.parent))
    tiny.run(settings(), copy)


def test_job_without_any_intact_step_says_so_and_touches_nothing(copy):
    folder = copy / "checkpoints" / "stage1"
    for step in checkpoint.steps_in(epath.Path(folder)):
        flip(largest_file(folder / str(step)))
    before = {path.name for path in folder.iterdir()} - {"trash"}
    with pytest.raises(UserError, match="every checkpoint in .* is damaged: 6/state"):
        tiny.run(settings(), copy)
    assert {path.name for path in folder.iterdir()} - {"trash"} == before


def test_load_takes_no_other_step_than_the_one_asked_for(copy):
    step = copy / "checkpoints" / "stage1" / "6"
    flip(largest_file(step))
    for path in (copy, step):
        with pytest.raises(UserError, match=r"6 is damaged: .*another step \(.*4\)"):
            atebm_jax.load(path)
    atebm_jax.load(step.parent / "4")


def test_stage2_does_not_start_from_damaged_weights(copy, tmp_path):
    flip(largest_file(copy / "checkpoints" / "stage1" / "6"))
    both = tiny.config(stages="stage2", **FEW)
    with pytest.raises(UserError, match=r"at step 4 of 6 \(step 6 is damaged: state"):
        tiny.run(both, copy)
    both.init_from = str(copy)
    with pytest.raises(UserError, match="6 is damaged"):
        tiny.run(both, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_checkpoint_of_an_earlier_version_is_taken_and_said_to_be_unchecked(
    copy, finished, caplog
):
    step = copy / "checkpoints" / "stage1" / "6"
    (step / checksums.FILE).unlink()
    tiny.run(settings(), copy)
    assert "6 has no checksums" in caplog.text
    assert_same_end(copy, finished)


def test_newest_intact_step_is_chosen(finished, tmp_path):
    folder = epath.Path(shutil.copytree(finished, tmp_path / "copy"))
    folder = checkpoint.stage_folder(folder, "stage1")
    assert intact.newest(folder) == (6, {})
    shutil.copytree(folder / "4", folder / "5")
    flip(largest_file(Path(folder / "6")))
    largest_file(Path(folder / "5")).unlink()
    step, damaged = intact.newest(folder)
    assert step == 4 and list(damaged) == [6, 5] and "is missing" in damaged[5]


# --- The workdir ----------------------------------------------------------------------


def test_full_disk_ends_the_job_and_with_room_it_ends_alike(mounted, finished):
    folder, remount = mounted
    with pytest.raises(UserError, match="cannot be written any more .No space left"):
        tiny.run(settings(), folder / "run")
    stage1 = checkpoint.stage_folder(folder / "run", "stage1")
    for step in checkpoint.steps_in(stage1):
        checkpoint.load_weights(stage1 / str(step))
    remount("size=30m")
    tiny.run(settings(), folder / "run")
    assert_same_end(folder / "run", finished)


@pytest.mark.slow
def test_full_disk_is_told_in_one_line(mounted, tmp_path):
    """Orbax's threads say it too, at length; the command does not pass that on."""
    folder, _ = mounted
    (tmp_path / "run").symlink_to(folder)
    process = jobs.start(tmp_path / "run", "--config.stages=stage1")
    assert process.wait() == 2
    log = jobs.log_of(tmp_path / "run").read_text()
    assert "No space left on device" in log.splitlines()[-1]
    assert "Traceback" not in log and log.count("No space left") == 1


def test_workdir_that_fails_in_the_middle_is_told_and_goes_on(
    tmp_path, finished, monkeypatch
):
    """As on a full disk, where none can be mounted."""
    write = MetricWriter.write

    def fail(self, stage, step, metrics):
        if step == 4:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        write(self, stage, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "write", fail)
        with pytest.raises(UserError, match="Disk quota exceeded"):
            tiny.run(settings(), tmp_path / "run")
    tiny.run(settings(), tmp_path / "run")
    assert_same_end(tmp_path / "run", finished)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EFBIG])
def test_storage_that_cannot_be_written_is_told_whoever_tried(tmp_path, number):
    own = OSError(number, os.strerror(number))
    passed_on = ValueError("the library says no")
    passed_on.__cause__ = own
    # Tensorstore gives a text alone.
    text = f"RESOURCE_EXHAUSTED: {os.strerror(number)} [os_error_code='{number}']"
    message = f"{os.strerror(number)}.*the same command"
    for error in (own, passed_on, ValueError(text)):
        with (
            pytest.raises(UserError, match=message),
            storage.told_plainly(epath.Path(tmp_path)),
        ):
            raise error


def test_other_errors_are_left_as_they_are(tmp_path):
    for error in (KeyError("x"), FileNotFoundError(2, "gone"), UserError("mine")):
        with (
            pytest.raises(type(error)) as raised,
            storage.told_plainly(epath.Path(tmp_path)),
        ):
            raise error
        assert raised.value is error


@pytest.mark.parametrize("begun", [False, True])
def test_read_only_workdir_is_refused(mounted, finished, begun):
    folder, remount = mounted
    remount("size=30m")
    if begun:
        shutil.copytree(finished / "checkpoints", folder / "checkpoints")
        shutil.copy(finished / "config.json", folder)
    remount("ro")
    workdir = folder if begun else folder / "new"
    with pytest.raises(UserError, match="cannot be written: .*Read-only"):
        tiny.run(settings(), workdir)


def test_file_in_place_of_the_workdir_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="workdir .*run cannot be written"):
        tiny.run(settings(), tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


# --- The data -------------------------------------------------------------------------


def test_vanished_images_end_the_job_by_name_and_with_them_it_ends_alike(
    tmp_path, monkeypatch
):
    rng = np.random.default_rng(0)
    for index in range(40):
        path = tmp_path / "images" / str(index % 10) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
    source = data.open_source(f"folder:{tmp_path / 'images'}")
    # Otherwise all is read ahead.
    monkeypatch.setitem(data.train_batches.__kwdefaults__, "prefetch", 1)
    write = MetricWriter.write

    def write_and_remove(self, stage, step, metrics):
        write(self, stage, step, metrics)
        if step == 2 and (tmp_path / "images").exists():
            (tmp_path / "images").rename(tmp_path / "elsewhere")

    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "write", write_and_remove)
        with pytest.raises(UserError, match="images cannot be decoded.*png"):
            tiny.run(settings(), tmp_path / "run", sources={"train": source})
    (tmp_path / "elsewhere").rename(tmp_path / "images")
    for name in ("run", "undisturbed"):
        tiny.run(settings(), tmp_path / name, sources={"train": source})
    weights = [
        checkpoint.load_weights(tmp_path / name)[0] for name in ("run", "undisturbed")
    ]
    reference.assert_same_bits(*weights)
