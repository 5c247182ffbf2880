"""What a running job shows and writes: progress, `metrics.jsonl`, event files."""

import contextlib
import errno
import importlib.util
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
from etils import epath
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from atebm_jax.errors import UserError
from atebm_jax.names import writable

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
        self._workdir = workdir
        self._path = workdir / "metrics.jsonl"
        self._events: dict[str, tensorboardX.SummaryWriter] = {}
        self._opened = 0
        # Of a file in a bucket: all its lines, and how many of them are there.
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
            kept = [
                json.dumps(record)
                for record in read_metrics(self._workdir)
                if record["stage"] != stage
                or record["step"] <= step
                and record.get("rollbacks", 0) <= rollbacks
            ]
            lines = [f"{line}\n" for line in kept]
            replace_text(self._path, "".join(lines))
            if in_bucket(self._path):
                self._lines, self._uploaded = lines, len(lines)
        # It imports PyTorch where that is installed, which takes seconds.
        import tensorboardX

        if stage in self._events:
            self._events[stage].close()
        # Its name has the second: of two in one second the later took the place of the
        # earlier.
        self._opened += 1
        self._events[stage] = tensorboardX.SummaryWriter(
            os.fspath(self._workdir / "events" / stage),
            purge_step=step + 1,
            filename_suffix=f".{os.getpid()}.{self._opened}",
        )

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one record."""
        if not self._active:
            return
        self._add(json.dumps({"stage": stage, "step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._events[stage].add_scalar(name, value, step)
        if not in_bucket(self._path):
            self._events[stage].flush()

    def _add(self, line: str) -> None:
        """Appends a line; in a bucket, where files are only replaced, now and then."""
        if not in_bucket(self._path):
            with self._path.open("a") as file:
                file.write(line)
            return
        self._lines.append(line)
        if time.monotonic() >= self._next_upload:
            self.flush()

    def flush(self) -> None:
        """Writes what has gathered; before a checkpoint, which will not repeat it."""
        if self._active and self._dirty():
            replace_text(self._path, "".join(self._lines))
            for events in self._events.values():
                events.flush()
            self._uploaded = len(self._lines)
            self._next_upload = time.monotonic() + _SECONDS_BETWEEN_UPLOADS

    def _dirty(self) -> bool:
        return len(self._lines) > self._uploaded

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


def in_bucket(path: epath.Path) -> bool:
    """Whether files there are objects (gs://, s3://), which cannot be appended to."""
    return "://" in os.fspath(path)


# What a workdir in a bucket needs: module -> package.
_FOR_BUCKETS = {"gcsfs": "gcsfs", "google.cloud.storage": "google-cloud-storage"}


def check_bucket(path: epath.Path) -> None:
    """Refuses gs:// where the packages that reach it are not installed.

    Raises:
      UserError: names them and the extra that has them.
    """
    if not os.fspath(path).startswith("gs://"):
        return
    missing = [name for module, name in _FOR_BUCKETS.items() if not _found(module)]
    if missing:
        raise UserError(
            f"{path} is in a bucket and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'atebm_jax[gcs]'."
        )


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


# What an error that comes from a file system without room, or read only, can say.
_UNWRITABLE = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EFBIG: "File too large",
    # What Linux makes of a disk that fails.
    errno.EROFS: "Read-only file system",
}


@contextlib.contextmanager
def told_plainly(
    folder: str | os.PathLike,
    what: str = "workdir",
    then: str = "from the last checkpoint",
) -> Iterator[None]:
    """Tells in one sentence that a folder cannot be written any more.

    Args:
      folder: a job's workdir, or what else is gone on with by the same command.
      what: it is.
      then: where the same command goes on.

    Raises:
      UserError: in place of an error that says so, by whatever library it came.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = why_unwritable(error)
        if reason is None:
            raise
        raise UserError(
            f"{what} {os.fspath(folder)} cannot be written any more ({reason}): once "
            f"it can, the same command goes on {then}."
        ) from error


def why_unwritable(error: BaseException | None) -> str | None:
    """The reason if an error, or one that it came from, is of a full disk."""
    while error is not None:
        for number, text in _UNWRITABLE.items():
            if getattr(error, "errno", None) == number or text in str(error):
                return text
        error = error.__cause__ or error.__context__
    return None


def replace_text(path: epath.Path, text: str) -> None:
    """Writes a file so that a killed process leaves the old or the new one, whole."""
    replace_bytes(path, writable(text).encode())


def replace_bytes(path: epath.Path, content: bytes) -> None:
    """As `replace_text`."""
    if in_bucket(path) or is_device(path):
        # An object appears when it is complete; renaming would copy it.
        path.write_bytes(content)
        return
    temporary = path.parent / f".{path.name}.tmp"
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def is_device(path: str | os.PathLike) -> bool:
    """Whether something is there that is neither a file nor a folder.

    A pipe or `/dev/stdout` is written through, and no file takes its place.
    """
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def say(console: Console, text: str) -> None:
    """Prints a line as it is, once for all processes.

    Whatever holds a user's text (a path, a name) is printed so, or stands in a table as
    `Text`: rich reads plain strings as markup, and "[bold]" is a fine name of a folder.
    """
    if jax.process_index() == 0:
        console.print(Text(writable(text)), soft_wrap=True)


# Metrics of the progress line, in this order, with their format.
_SHOWN = (
    ("T", "T {:.0f}"),
    ("auc", "AUC {:.2f}"),
    ("loss_ce", "CE {:.3f}"),
    ("loss_bce", "BCE {:.3f}"),
    ("images_per_second", "{:.0f} img/s"),
)


class ProgressLine:
    """A progress bar on a terminal; elsewhere a plain line now and then."""

    def __init__(self, console: Console, stage: str, step: int, total: int):
        self._console = console
        self._stage = stage
        self._total = total
        self._bar: Progress | None = None
        self._next_line = time.monotonic()
        if jax.process_index() == 0 and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}", markup=False),
                console=console,
            )
            self._task = self._bar.add_task(
                stage, completed=step, total=total, shown="compiling"
            )
            self._bar.start()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics of a step."""
        shown = "  ".join(
            form.format(metrics[name]) for name, form in _SHOWN if name in metrics
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, shown=shown)
        elif jax.process_index() == 0 and time.monotonic() >= self._next_line:
            say(self._console, f"{self._stage} step {step}/{self._total}  {shown}")
            self._next_line = time.monotonic() + 5

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        say(self._console, text)

    def close(self) -> None:
        """Leaves the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.stop()
