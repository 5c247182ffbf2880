"""The metrics of a job on disk: `metrics.jsonl` and TensorBoard's event files."""

import json
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from atebm_jax import storage

if TYPE_CHECKING:
    import tensorboardX

# A whole file travels at each upload to a bucket.
_SECONDS_BETWEEN_UPLOADS = 30.0


class MetricWriter:
    """Appends metrics to `metrics.jsonl` and to TensorBoard event files.

    Only the first process writes. After a resume what lies behind the restored step is
    cut away, so that every step of a stage stands there once.
    """

    def __init__(self, workdir: epath.Path):
        self._active = jax.process_index() == 0
        self._workdir, self._path = workdir, workdir / "metrics.jsonl"
        self._events: dict[str, tensorboardX.SummaryWriter] = {}
        self._opened = 0
        # Of a file in a bucket: all its lines, and how many of them are there.
        self._bucket = storage.in_bucket(self._path)
        self._lines: list[str] = []
        self._uploaded = 0
        self._next_upload = 0.0

    def rewind(self, stage: str, step: int, rollbacks: int = 0) -> None:
        """Drops what was written of `stage` after `step`, before going on from it.

        Marks of rollbacks after the first `rollbacks` go too: they come again.
        """
        if not self._active:
            return
        self.flush()
        if self._path.exists():
            lines = [
                json.dumps(record) + "\n"
                for record in read_metrics(self._workdir)
                if record["stage"] != stage
                or record["step"] <= step
                and record.get("rollbacks", 0) <= rollbacks
            ]
            storage.replace_text(self._path, "".join(lines))
            if self._bucket:
                self._lines, self._uploaded = lines, len(lines)
        # It imports PyTorch where that is installed, which takes seconds.
        import tensorboardX

        if stage in self._events:
            self._events[stage].close()
        # The name of the file has the second: two of one second would be one.
        self._opened += 1
        self._events[stage] = tensorboardX.SummaryWriter(
            os.fspath(self._workdir / "events" / stage),
            purge_step=step + 1,
            filename_suffix=f".{os.getpid()}.{self._opened}",
        )

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one record; to a file in a bucket now and then."""
        if not self._active:
            return
        for name, value in metrics.items():
            self._events[stage].add_scalar(name, value, step)
        line = json.dumps({"stage": stage, "step": step, **metrics}) + "\n"
        if not self._bucket:
            with self._path.open("a") as file:
                file.write(line)
            self._events[stage].flush()
            return
        self._lines.append(line)
        if time.monotonic() >= self._next_upload:
            self.flush()

    def flush(self) -> None:
        """Writes what has gathered; before a checkpoint, which will not repeat it."""
        if self._active and len(self._lines) > self._uploaded:
            storage.replace_text(self._path, "".join(self._lines))
            for events in self._events.values():
                events.flush()
            self._uploaded = len(self._lines)
            self._next_upload = time.monotonic() + _SECONDS_BETWEEN_UPLOADS

    def close(self) -> None:
        """Writes the last lines and closes the event files."""
        self.flush()
        for events in self._events.values():
            events.close()


def read_metrics(workdir: epath.Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, without lines cut off by a killed job."""
    path = workdir / "metrics.jsonl"
    records = []
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and {"stage", "step"} <= record.keys():
            records.append(record)
    return records
