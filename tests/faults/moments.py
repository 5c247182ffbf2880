"""Moments at which to kill a job, told from outside by what lies in its workdir."""

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

# Names in the folder of a step without metrics.
_FILES_OF_A_STEP = 5

# Seconds between two looks at the workdir: deleting a checkpoint takes some
# milliseconds.
_LOOK_EVERY = 0.001

# Moment -> longest random delay after it is seen, in seconds.
DELAYS = {
    "starting": 8.0,
    "loading data": 1.0,
    "stepping": 0.05,
    "evaluating": 0.5,
    "saving": 0.04,
    "committing": 0.004,
    "deleting": 0.002,
    "emptying the trash": 0.002,
}


def possible(workdir: Path) -> list[str]:
    """The moments that the next start of a job can come by."""
    trash = any(_names(path) for path in workdir.glob("checkpoints/*/trash"))
    return [moment for moment in DELAYS if trash or moment != "emptying the trash"]


class Watch:
    """One look after another at a running job."""

    def __init__(self, workdir: Path, pids: Sequence[int]):
        self._workdir, self._pids = workdir, pids
        self._metrics = self._size()
        self._trash, self._steps, self._saves = self._look()
        self._had_saves = False

    def wait(
        self, moment: str, processes: Sequence[BaseProcess], rng: random.Random
    ) -> bool:
        """Waits for a moment and a random while after it; False if the job ends."""
        if moment != "starting":
            # Not always the first one: the job shall get on between its kills.
            for _ in range(rng.choice((1, 2, 3)) if moment in _REPEATED else 1):
                if not self._seen(moment, processes):
                    return False
        end = time.monotonic() + rng.uniform(0.0, DELAYS[moment])
        while time.monotonic() < end:
            if not all(process.is_alive() for process in processes):
                return False
            time.sleep(min(0.01, max(end - time.monotonic(), 0.0)))
        return all(process.is_alive() for process in processes)

    def _seen(self, moment: str, processes: Sequence[BaseProcess]) -> bool:
        happened = _MOMENTS[moment]
        while not happened(self):
            if not all(process.is_alive() for process in processes):
                return False
            time.sleep(_LOOK_EVERY)
        return True

    def state(self) -> str:
        """What the workdir shows."""
        trash, steps, saves = self._look()
        if saves:
            return "a save half done"
        if any(not (path / "commit_success.txt").exists() for path in trash):
            return "a deletion half done"
        if trash:
            return "deleted steps in the trash"
        return "nothing half done" if steps else "no checkpoint yet"

    def _look(self) -> tuple[set[Path], set[Path], set[Path]]:
        trash, steps, saves = set(), set(), set()
        for folder in self._workdir.glob("checkpoints/*"):
            for name in _names(folder):
                if "orbax-checkpoint-tmp" in name:
                    saves.add(folder / name)
                elif name.isdigit():
                    steps.add(folder / name)
            trash |= {folder / "trash" / name for name in _names(folder / "trash")}
        return trash, steps, saves

    def _size(self) -> int:
        path = self._workdir / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    # --- Moments ---

    def _loads_data(self) -> bool:
        """A worker process is there, and no step was logged since the start."""
        return any(map(_has_workers, self._pids)) and self._size() <= self._metrics

    def _steps_on(self) -> bool:
        before, self._metrics = self._metrics, self._size()
        return self._metrics > before

    def _evaluates(self) -> bool:
        path = self._workdir / "metrics.jsonl"
        lines = path.read_text().splitlines()[-1:] if path.exists() else []
        try:
            record = json.loads(lines[0]) if lines else {}
        except json.JSONDecodeError:
            return False
        due = record.get("step", 1) % 12 == 0
        return due and "loss" in record and self._size() != self._metrics

    def _saves_now(self) -> bool:
        before, self._had_saves = self._had_saves, bool(self._look()[2])
        return self._had_saves and not before

    def _commits(self) -> bool:
        before = self._steps
        self._steps = self._look()[1]
        return bool(self._steps - before)

    def _deletes(self) -> bool:
        before = self._trash
        self._trash = self._look()[0]
        return bool(self._trash - before)

    def _empties(self) -> bool:
        """Less lies in the trash than when the job began."""
        return any(len(_names(path)) < _FILES_OF_A_STEP for path in self._trash)


_REPEATED = {"stepping", "saving", "committing", "deleting"}

_MOMENTS: dict[str, Callable[[Watch], bool]] = {
    "loading data": Watch._loads_data,
    "stepping": Watch._steps_on,
    "evaluating": Watch._evaluates,
    "saving": Watch._saves_now,
    "committing": Watch._commits,
    "deleting": Watch._deletes,
    "emptying the trash": Watch._empties,
}


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _has_workers(pid: int) -> bool:
    """Whether a process has worker processes; none where it has just ended."""
    try:
        children = psutil.Process(pid).children(recursive=True)
        return any("spawn_main" in " ".join(child.cmdline()) for child in children)
    except psutil.NoSuchProcess:
        return False
