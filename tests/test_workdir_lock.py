"""One job at a time on a workdir, however the one before has ended."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
from etils import epath

from atebm_jax import UserError, workdir_lock
from atebm_jax.workdir_lock import Lock

ROOT = Path(__file__).parents[1]

HOLDER = """
import sys, time
from etils import epath
from atebm_jax.workdir_lock import Lock
Lock(epath.Path(sys.argv[1])).acquire()
print("holds", flush=True)
time.sleep(600)
"""


@pytest.fixture
def lock_of(tmp_path):
    """Locks of other jobs on the same workdir, given back at the end."""
    made = []

    def make():
        made.append(Lock(epath.Path(tmp_path)))
        return made[-1]

    yield make
    for lock in made:
        lock.release()


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that cannot lock files, in quick motion."""
    monkeypatch.setattr(Lock, "_lock_file", lambda self: False)
    monkeypatch.setattr(workdir_lock, "_BEAT", 0.05)
    monkeypatch.setattr(workdir_lock, "_LOOK_EVERY", 0.1)


def test_second_job_is_refused_with_who_holds_it_and_nothing_is_written(
    lock_of, tmp_path
):
    lock_of().acquire()
    holder = f"process {os.getpid()} on {socket.gethostname()}, since 20"
    with pytest.raises(
        UserError, match=rf"in use by another job \({holder}.*--workdir"
    ):
        tiny.run(tiny.config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [workdir_lock.FILE]


def test_lock_is_free_again_after_its_release(lock_of):
    first, second = lock_of(), lock_of()
    first.acquire()
    first.acquire()
    first.check()
    first.release()
    second.acquire()
    with pytest.raises(UserError, match="in use"):
        first.acquire()


def test_lock_of_a_killed_job_is_free(lock_of, tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert holder.stdout.readline() == "holds\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on"):
        lock_of().acquire()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock_of().acquire()


def test_lock_that_is_given_back_leaves_no_file(lock_of, tmp_path):
    lock_of().acquire()
    (tmp_path / workdir_lock.FILE).unlink()
    (tmp_path / workdir_lock.FILE).write_text("of somebody else")
    lock = lock_of()
    lock.acquire()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_lock_whose_file_goes_as_it_is_taken_is_taken_anew(
    lock_of, tmp_path, monkeypatch
):
    """Its holder removes it between the opening and the locking."""
    flock, path = workdir_lock.fcntl.flock, tmp_path / workdir_lock.FILE
    calls = []

    def late(file, how):
        calls.append(file)
        if len(calls) == 1:
            path.unlink()
        flock(file, how)

    monkeypatch.setattr(workdir_lock.fcntl, "flock", late)
    lock_of().acquire()
    assert len(calls) == 2 and path.exists()
    with pytest.raises(UserError, match="in use"):
        lock_of().acquire()


def test_any_folder_is_held_by_one_command(tmp_path):
    out = tmp_path / "a" / "b"
    taken = rf"^folder {out} is in use by another job.*another --out\.$"
    with workdir_lock.held(out, "--out"):
        with pytest.raises(UserError, match=taken), workdir_lock.held(out, "--out"):
            pass
        (out / "file").touch()
    assert [path.name for path in out.iterdir()] == ["file"]
    (out / "loop").symlink_to("loop")
    for place in (out / "file", out / "loop", "/dev/null"):
        message = f"{place} cannot be written: it is no folder. Give another --out"
        with (
            pytest.raises(UserError, match=message),
            workdir_lock.held(place, "--out"),
        ):
            pass


def test_workdir_that_is_not_there_is_not_made(tmp_path):
    lock = Lock(epath.Path(tmp_path / "new"))
    lock.acquire()
    assert not (tmp_path / "new").exists()


def test_failed_start_gives_the_lock_back(lock_of, tmp_path):
    with pytest.raises(UserError, match="num_classes"):
        tiny.run(tiny.config(**{"model.num_classes": 7}), tmp_path)
    lock_of().acquire()


# --- Without locks of the file system -------------------------------------------------


def test_sign_of_life_holds_a_workdir_and_goes_with_its_job(
    without_locks, lock_of, tmp_path
):
    first, second = lock_of(), lock_of()
    first.acquire()
    with pytest.raises(UserError, match="in use by another job"):
        second.acquire()
    first.check()
    first.release()
    assert not list(tmp_path.iterdir())
    second.acquire()


@pytest.mark.parametrize("content", ['{"pid": 7, "holds": true}', "{", ""])
def test_owner_without_a_sign_of_life_is_void(
    without_locks, lock_of, tmp_path, monkeypatch, content
):
    monkeypatch.setattr(workdir_lock, "_PATIENCE", 1.0)
    void = tmp_path / f"{workdir_lock.FILE}.1"
    void.write_text(content)
    lock = lock_of()
    began = time.monotonic()
    lock.acquire()
    assert time.monotonic() - began > workdir_lock._PATIENCE
    assert not void.exists()
    lock.check()


@pytest.mark.parametrize("seed", range(6))
def test_of_some_that_start_at_once_one_has_it(
    without_locks, lock_of, monkeypatch, seed
):
    """However long each of them is held up between any two of its acts."""
    delays = random.Random(seed)

    def late(act):
        def wait_and_act(*arguments, **named):
            time.sleep(delays.choice((0, 0, 0.05, 0.3, 0.6)))
            return act(*arguments, **named)

        return wait_and_act

    for name in ("_others", "_renew"):
        monkeypatch.setattr(Lock, name, late(getattr(Lock, name)))
    refused = []

    def start(lock):
        try:
            lock.acquire()
        except UserError:
            refused.append(lock)

    locks = [lock_of() for _ in range(2 + seed % 2)]
    threads = [threading.Thread(target=start, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == len(locks) - 1


@pytest.mark.parametrize("how", ["removed", "another_holds"])
def test_job_whose_lock_was_taken_for_void_is_told(
    without_locks, lock_of, tmp_path, how
):
    lock = lock_of()
    lock.acquire()
    other = {"pid": 7, "host": "elsewhere", "holds": True}
    # After and before every job's, whose names are hexadecimal.
    name = {"removed": "z", "another_holds": "-"}[how]
    (tmp_path / f"{workdir_lock.FILE}.{name}").write_text(json.dumps(other))
    if how == "removed":
        lock._claim.unlink()
    end = time.monotonic() + 20
    while lock._taken_by is None and time.monotonic() < end:
        time.sleep(0.02)
    with pytest.raises(UserError, match="process 7 on elsewhere"):
        lock.check()
    lock.release()
    # The other one's stays.
    assert [path.name for path in tmp_path.iterdir()] == [f".lock.{name}"]
