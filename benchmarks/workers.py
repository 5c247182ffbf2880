"""Worker processes that the parent asks, one at a time, to do something.

Each side of a comparison lives in its own process, so that thread limits and CPU
affinity hold for it alone and its CPU seconds are its own.
"""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from atebm_jax.errors import UserError


class Worker:
    """A side of the comparison in another process.

    Args:
      build: makes the object whose methods `call` calls; importable by name.
      settings: its only argument.
      threads: CPU threads it may use, and CPUs it is pinned to.
    """

    def __init__(self, build: Callable[[Any], Any], settings: Any, threads: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, build, settings, threads), daemon=True
        )
        # Read when the child imports its libraries, before any code of ours.
        with _environment(_thread_limits(threads)):
            self._process.start()
        theirs.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method there and waits for its result.

        Raises:
          UserError: as raised there.
          RuntimeError: it failed otherwise; its traceback is on stderr.
        """
        self._pipe.send((method, arguments))
        try:
            kind, result = self._pipe.recv()
        except EOFError as error:
            raise RuntimeError(f"the worker died while in {method!r}") from error
        if kind == "mistake":
            raise UserError(result)
        return result

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()


def _serve(
    pipe: Connection, build: Callable[[Any], Any], settings: Any, threads: int
) -> None:
    _pin(threads)
    side = None
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            side = build(settings) if side is None else side
            pipe.send(("result", getattr(side, method)(*arguments)))
        except UserError as error:
            pipe.send(("mistake", str(error)))


def _pin(threads: int) -> None:
    # The last CPUs: the first one serves more interrupts.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


def _thread_limits(threads: int) -> dict[str, str]:
    flags = os.environ.get("XLA_FLAGS", "")
    if threads == 1:
        flags += " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    return {
        "XLA_FLAGS": flags.strip(),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # Two frameworks share a GPU here.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def available_cpus() -> int:
    """CPUs that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
