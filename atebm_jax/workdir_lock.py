"""One job at a time on a workdir.

Where the file system locks files, the kernel holds the lock and frees it with the
process, however that ends. Elsewhere (buckets, some network mounts) the holder renews a
sign of life in the lock file, and one that is not renewed for a minute is void; no
clocks are compared.
"""

import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from typing import Any

import jax
from etils import epath

from atebm_jax import sharding
from atebm_jax.errors import UserError
from atebm_jax.reporting import in_bucket, replace_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

FILE = ".lock"

# Seconds between two signs of life, and without one until the holder counts as dead.
_BEAT = 20.0
_PATIENCE = 65.0
_LOOK_EVERY = 1.0
# Of two that take a free workdir at once the later writer has it: time for both.
_SETTLE = 2.0

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


class Lock:
    """The lock of a job on its workdir; process 0 holds it for all."""

    def __init__(self, workdir: epath.Path):
        self._workdir = workdir
        self._path = workdir / FILE
        self._owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            "job": uuid.uuid4().hex,
        }
        self._file: int | None = None
        self._beat: threading.Thread | None = None
        self._ended = threading.Event()
        self._taken_by: dict[str, Any] | None = None

    def acquire(self) -> None:
        """Takes the lock if the workdir is there; again, it does nothing.

        Every process must call it equally often.

        Raises:
          UserError: another job holds it, or the workdir cannot be written.
        """
        refusal = ""
        if jax.process_index() == 0 and not self._held() and self._workdir.is_dir():
            refusal = self._take()
        self._refuse(refusal)

    def check(self) -> None:
        """Refuses to go on where another job has taken a lock for void.

        Every process must call it equally often.

        Raises:
          UserError: names the other job.
        """
        self._refuse("" if self._taken_by is None else self._in_use(self._taken_by))

    def release(self) -> None:
        """Gives the lock back."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._beat is not None:
            self._ended.set()
            self._beat.join()
            self._beat = None
            if self._is_ours():
                self._path.unlink()

    def _held(self) -> bool:
        return self._file is not None or self._beat is not None

    def _refuse(self, refusal: str) -> None:
        refusal = sharding.first_said(refusal)
        if refusal:
            raise UserError(refusal)

    def _take(self) -> str:
        """Takes the lock; returns why it cannot, "" if it could."""
        try:
            if in_bucket(self._path) or fcntl is None or not self._lock_file():
                self._begin_beat()
        except BlockingIOError:
            return self._in_use(self._read() or {})
        except _InUse as error:
            return self._in_use(error.owner)
        except OSError as error:
            return f"workdir {self._workdir} cannot be written: {error}."
        return ""

    def _in_use(self, owner: dict[str, Any]) -> str:
        return (
            f"workdir {self._workdir} is in use by another job (process "
            f"{owner.get('pid', '?')} on {owner.get('host', '?')}, since "
            f"{owner.get('since', '?')}): wait for its end, stop it, or give another "
            "--workdir."
        )

    # --- Held by the kernel ---

    def _lock_file(self) -> bool:
        """Locks the file; False where the file system has no locks."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(file, 0)
            os.write(file, json.dumps(self._owner).encode())
        except OSError as error:
            os.close(file)
            if error.errno in _NO_LOCKS:
                return False
            raise
        self._file = file
        return True

    # --- Held by a sign of life ---

    def _begin_beat(self) -> None:
        """Writes the owner and renews it from a thread.

        Raises:
          _InUse: another one is renewed meanwhile.
        """
        first = self._read()
        if first is not None:
            _log.warning(
                "%s names another job: seeing within %.0f s whether it still lives",
                self._path,
                _PATIENCE,
            )
        end = time.monotonic() + _PATIENCE
        while first is not None and time.monotonic() < end:
            time.sleep(_LOOK_EVERY)
            now = self._read()
            if now is not None and now != first:
                raise _InUse(now)
            first = now
        self._renew(0)
        time.sleep(_SETTLE)
        if not self._is_ours():
            raise _InUse(self._read() or {})
        self._ended.clear()
        self._beat = threading.Thread(target=self._keep_renewing, daemon=True)
        self._beat.start()

    def _keep_renewing(self) -> None:
        count = 0
        while not self._ended.wait(_BEAT):
            count += 1
            try:
                owner = self._read()
                if owner is not None and owner.get("job") != self._owner["job"]:
                    self._taken_by = owner
                    return
                self._renew(count)
            except OSError:
                # Out of reach for a moment; the next one may come through.
                continue

    def _renew(self, count: int) -> None:
        # Whole at every moment: half a line would pass for nobody's.
        replace_text(self._path, json.dumps(self._owner | {"signs_of_life": count}))

    def _is_ours(self) -> bool:
        return (self._read() or {}).get("job") == self._owner["job"]

    def _read(self) -> dict[str, Any] | None:
        """Who holds the lock by the file; None without one that can be read."""
        try:
            owner = json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return owner if isinstance(owner, dict) else None


class _InUse(Exception):
    def __init__(self, owner: dict[str, Any]):
        super().__init__(owner)
        self.owner = owner
