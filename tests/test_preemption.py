"""SIGTERM to one of several processes: one checkpoint, and any number goes on."""

import signal
import sys
import time
from pathlib import Path

import pytest
import reference
from etils import epath

from atebm_jax import checkpoint, checksums
from atebm_jax.metric_writer import read_metrics
from atebm_jax.workdir_lock import Lock

sys.path.insert(0, str(Path(__file__).parent / "faults"))

import jobs

# Long steps, as the signal is looked for once a second. A smooth activation: with a
# rectifier another order of sums can choose another adversarial image.
FLAGS = (
    "--config.stages=stage1",
    "--config.log_every_steps=1",
    "--config.model.activation=swish",
    "--config.stage1.batch_size=16",
    "--config.stage1.num_steps=20",
    "--config.stage1.schedule=constant",
    "--config.stage1.learning_rate=0.01",
    "--config.stage1.adversary.num_steps=100",
    "--config.stage1.eval_every_steps=0",
)


def records(workdir):
    return [r for r in read_metrics(workdir) if "loss" in r]


def stop_one_of_two(workdir, rank):
    """Starts two processes, stops one by SIGTERM; returns the step they ended at."""
    before = len(records(workdir))
    processes = jobs.start_joined(workdir, 2, *FLAGS)
    try:
        while len(records(workdir)) <= before:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.05)
        processes[rank].send_signal(signal.SIGTERM)
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    log = jobs.log_of(workdir).read_text()
    assert codes == [128 + signal.SIGTERM] * 2, log
    assert "Traceback" not in log
    step = jobs.steps(workdir, "stage1")[-1]
    folder = checkpoint.stage_folder(workdir, "stage1") / str(step)
    assert checksums.exist(folder) and checksums.damage(folder) is None
    # All is saved: what was logged last is what the restart begins with.
    assert records(workdir)[-1]["step"] == step
    return step


def finish(workdir):
    """Runs one process to the end."""
    process = jobs.start(workdir, *FLAGS)
    assert process.wait() == 0, jobs.log_of(workdir).read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of one process that nothing has disturbed."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(workdir)
    return workdir


def assert_alike(workdir, alone):
    """The same images in every step; only the order of sums differs."""
    stopped, undisturbed = records(workdir), records(alone)
    assert [r["step"] for r in stopped] == [r["step"] for r in undisturbed]
    for one, other in zip(stopped, undisturbed, strict=True):
        assert abs(one["loss"] - other["loss"]) < 1e-5
    weights = [
        checkpoint.load_weights(folder / "checkpoints" / "stage1")[0]
        for folder in (workdir, alone)
    ]
    # Measured 2.4e-7 on weights of about 0.1.
    assert reference.max_difference(*weights) < 3e-6


@pytest.mark.jobs
def test_sigterm_to_one_process_saves_and_one_process_goes_on_alike(tmp_path, alone):
    assert 0 < stop_one_of_two(tmp_path / "run", 1) < 20
    finish(tmp_path / "run")
    assert_alike(tmp_path / "run", alone)


@pytest.mark.slow
def test_sigterm_again_to_the_other_process_of_a_job_that_went_on(tmp_path, alone):
    first = stop_one_of_two(tmp_path / "run", 1)
    # The steps go on from the first stop, the count of questions begins anew.
    assert first < stop_one_of_two(tmp_path / "run", 0) < 20
    finish(tmp_path / "run")
    assert_alike(tmp_path / "run", alone)


@pytest.mark.jobs
def test_second_job_ends_with_the_message_in_all_its_processes(tmp_path):
    (tmp_path / "run").mkdir()
    lock = Lock(epath.Path(tmp_path / "run"))
    lock.acquire()
    processes = jobs.start_joined(tmp_path / "run", 2, *FLAGS)
    assert [process.wait(timeout=240) for process in processes] == [2, 2]
    lock.release()
    log = jobs.log_of(tmp_path / "run").read_text()
    assert log.count("is in use by another job (process") == 2
    assert "Traceback" not in log
