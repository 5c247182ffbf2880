"""One job at a time on a workdir, one command at a time on any output folder.

Where the file system can lock files, the kernel holds the lock and releases it when the
process ends, in whatever way: a file that a killed process leaves locks nothing.
Elsewhere (buckets, some network mounts) each job first writes a file of its own, a
claim, and then looks for the claims of others. If two jobs start at once, at least one
sees the other, however slow either is. The holder renews its claim. A claim that does
not change for a minute is void; no clocks are compared.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from atebm_jax import sharding, storage
from atebm_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

FILE = ".lock"

# Seconds: between renewals of a claim, until one without is void, between looks.
_BEAT, _PATIENCE, _LOOK_EVERY = 20.0, 65.0, 1.0

_Owner = dict[str, Any]

# Errors of file systems that cannot lock files.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


class Lock:
    """The lock of a job on its workdir; process 0 holds it for all.

    Args:
      workdir: the folder.
      what: the kind of folder, for messages.
      flag: the flag that gave it, for messages.
      alone: this process is the whole job. It does not ask JAX for others, as that
        would take hold of the devices.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        what: str = "workdir",
        flag: str = "--workdir",
        alone: bool = False,
    ):
        self._what, self._flag, self._alone = what, flag, alone
        self._together: Callable[[], contextlib.AbstractContextManager[None]]
        self._together = contextlib.nullcontext if alone else sharding.refused_by_all
        self._workdir, self._path = workdir, workdir / FILE
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        self._file: int | None = None
        # For file systems without locks.
        self._claim = workdir / f"{FILE}.{uuid.uuid4().hex}"
        self._signs_of_life = 0
        self._beat: threading.Thread | None = None
        self._ended = threading.Event()
        self._taken_by: _Owner | None = None

    def acquire(self) -> None:
        """Takes the lock if the workdir exists and the lock is not held already.

        Every process must call it equally often.

        Raises:
          UserError: another job holds it, or the workdir cannot be written.
        """
        with self._together():
            held = self._file is not None or self._beat is not None
            first = self._alone or jax.process_index() == 0
            if held or not first or not self._workdir.is_dir():
                return
            try:
                in_bucket = storage.in_bucket(self._path)
                if in_bucket or fcntl is None or not self._lock_file():
                    self._claim_workdir()
            except BlockingIOError as error:
                raise self._in_use(_read(self._path)) from error
            except OSError as error:
                raise UserError(
                    f"{self._what} {self._workdir} cannot be written: {error}."
                ) from error

    def check(self) -> None:
        """Refuses to go on if another job has taken this job's claim for void.

        Every process must call it equally often.

        Raises:
          UserError: names the other job.
        """
        with self._together():
            if self._taken_by is not None:
                raise self._in_use(self._taken_by)

    def release(self) -> None:
        """Releases the lock and removes its file."""
        if self._file is not None:
            self._unlink(self._file)
            os.close(self._file)
            self._file = None
        if self._beat is not None:
            self._ended.set()
            self._beat.join()
            self._beat = None
            self._claim.unlink(missing_ok=True)

    def _in_use(self, owner: _Owner) -> UserError:
        return UserError(
            f"{self._what} {self._workdir} is in use by another job (process "
            f"{owner.get('pid', '?')} on {owner.get('host', '?')}, since "
            f"{owner.get('since', '?')}): wait for its end, stop it, or give another "
            f"{self._flag}."
        )

    # --- Held by the kernel ---

    def _lock_file(self) -> bool:
        """Locks the file; False where the file system has no locks."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            in_place = self._is_in_place(file)
            if in_place:
                os.ftruncate(file, 0)
                os.write(file, json.dumps(self._owner).encode())
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                self._unlink(file)
            os.close(file)
            if error.errno in _NO_LOCKS:
                return False
            raise
        if not in_place:
            # Its holder has just removed it; other jobs would lock a new file.
            os.close(file)
            return self._lock_file()
        self._file = file
        return True

    def _unlink(self, file: int) -> None:
        """Removes the open file, unless another one lies in its place."""
        with contextlib.suppress(OSError):
            if self._is_in_place(file):
                self._path.unlink()

    def _is_in_place(self, file: int) -> bool:
        """Whether the open file is still the one in the workdir."""
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        except FileNotFoundError:
            return False

    # --- Held by a claim ---

    def _claim_workdir(self) -> None:
        """Claims the workdir and renews the claim from a thread.

        A job holds the workdir once it has written its claim and then seen no other. Of
        two claims that see each other, the one later by name is withdrawn.

        Raises:
          UserError: another job holds the workdir and lives.
        """
        known: dict[str, tuple[_Owner, float]] = {}
        claimed = False
        try:
            while True:
                others = self._others()
                if claimed and not others:
                    break
                if claimed and min(others) < self._claim.name:
                    self._claim.unlink(missing_ok=True)
                    claimed = False
                if claimed or not others:
                    # Renew also while waiting: the claim must not become void.
                    self._renew(holds=False)
                    claimed = True
                if others:
                    self._watch(others, known)
                    time.sleep(_LOOK_EVERY)
            self._renew(holds=True)
        except BaseException:
            self._claim.unlink(missing_ok=True)
            raise
        self._ended.clear()
        self._beat = threading.Thread(target=self._keep_renewing, daemon=True)
        self._beat.start()

    def _watch(
        self, others: dict[str, _Owner], known: dict[str, tuple[_Owner, float]]
    ) -> None:
        """Removes void claims; `known` has each claim and the time when it changed.

        Raises:
          UserError: a holder has renewed its claim.
        """
        now = time.monotonic()
        for name, owner in others.items():
            if name not in known:
                _log.warning(
                    "%s names another job: seeing within %.0f s whether it still lives",
                    self._workdir / name,
                    _PATIENCE,
                )
                known[name] = owner, now
            before, since = known[name]
            if owner != before:
                if owner.get("holds"):
                    raise self._in_use(owner)
                known[name] = owner, now
            elif now - since > _PATIENCE:
                (self._workdir / name).unlink(missing_ok=True)

    def _keep_renewing(self) -> None:
        while not self._ended.wait(_BEAT):
            try:
                others = self._others()
                # The claim of a job that was cut off for long became void: it has gone,
                # or came back just now. Of two holders the one later by name yields.
                gone = not self._claim.exists()
                holders = [
                    owner
                    for name, owner in others.items()
                    if gone or (owner.get("holds") and name < self._claim.name)
                ]
                if gone or holders:
                    self._taken_by = holders[0] if holders else {}
                    return
                self._renew(holds=True)
            except OSError:
                continue  # out of reach for a moment

    def _renew(self, holds: bool) -> None:
        self._signs_of_life += 1
        owner = {"holds": holds, "signs_of_life": self._signs_of_life}
        # Written whole: half a file would not name the job.
        storage.write_json(self._claim, self._owner | owner)

    def _others(self) -> dict[str, _Owner]:
        """The claims of other jobs by name."""
        return {
            path.name: _read(path)
            for path in self._workdir.iterdir()
            if path.name.startswith(f"{FILE}.") and path.name != self._claim.name
        }


@contextlib.contextmanager
def held(folder: str | os.PathLike, flag: str, *, alone: bool = True) -> Iterator[None]:
    """Makes a folder and locks it while one command writes into it.

    Args:
      folder: local, unless all processes of a job call this.
      flag, alone: as of `Lock`.

    Raises:
      UserError: another command writes there, or it cannot be written.
    """
    path = epath.Path(folder)
    with storage.writing(f"folder {path}", f"Give another {flag}."):
        path.mkdir(parents=True, exist_ok=True)
    lock = Lock(path, what="folder", flag=flag, alone=alone)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _read(path: epath.Path) -> _Owner:
    """The job that a file names; empty if it cannot be read."""
    try:
        owner = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}
