"""The command stopped or killed from outside."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent / "faults"))

import jobs
import kill

pytestmark = pytest.mark.jobs


@pytest.fixture
def training(tmp_path):
    """A job with a worker process, in the middle of stage 1, and its log."""
    workdir = tmp_path / "run"
    longer = "--config.stage1.num_steps=200"
    process = jobs.start(
        workdir, "--config.data.num_workers=1", longer, config=jobs.SMALL
    )
    give_up = threading.Timer(600, process.kill)
    give_up.start()
    while not (workdir / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    yield process, tmp_path / "run.log"
    give_up.cancel()
    process.kill()
    process.wait()


def alive(processes):
    """Of these the ones that still run."""
    _, running = psutil.wait_procs(processes, timeout=20)
    return running


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_all_processes_ends_with_one_clear_line(training, number):
    process, log = training
    workers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)
    assert process.wait() == 128 + number
    last = log.read_text().splitlines()[-1]
    assert f"stopped by {signal.Signals(number).name}: everything is saved" in last
    assert "Traceback" not in log.read_text()
    assert alive(workers) == []


def test_killed_job_leaves_no_worker_behind(training):
    process, _ = training
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.kill()
    process.wait()
    assert alive(workers) == []


@pytest.mark.slow
def test_killed_data_worker_ends_the_job_with_one_clear_line(training):
    process, log = training
    children = psutil.Process(process.pid).children(recursive=True)
    worker = next(c for c in children if "spawn_main" in " ".join(c.cmdline()))
    worker.kill()
    assert process.wait() == 2
    last = log.read_text().splitlines()[-1]
    assert "a worker process that makes batches has ended (exit code -9)" in last
    assert "Traceback" not in log.read_text()
    assert alive(children) == []


def test_killed_runs_end_bit_identically(tmp_path):
    assert kill.compare(tmp_path, kills=2, seed=1, config=jobs.SMALL).found == []
