"""Progress of an evaluation: bars on a terminal, plain lines elsewhere."""

import contextlib
import datetime
import time
from collections.abc import Iterator

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from atebm_jax.evaluate.context import ShowFn
from atebm_jax.reporting import say

_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress(console: Console) -> Iterator[ShowFn]:
    """Shows the parts of an evaluation with the time that is left for each.

    Only the first process shows anything.

    Yields:
      A function of (part, batches done, batches in all).
    """
    if jax.process_index() != 0:
        yield lambda name, done, total: None
    elif console.is_terminal:
        with _bars(console) as bars:
            yield _on_bars(bars)
    else:
        yield _in_lines(console)


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _on_bars(bars: Progress) -> ShowFn:
    tasks: dict[str, TaskID] = {}

    def show(name: str, done: int, total: int) -> None:
        if name not in tasks:
            tasks[name] = bars.add_task(name, total=total)
        # Finished parts make room for those that run.
        bars.update(tasks[name], completed=done, total=total, visible=done < total)

    return show


def _in_lines(console: Console) -> ShowFn:
    began: dict[str, tuple[float, int]] = {}
    next_line = time.monotonic()

    def show(name: str, done: int, total: int) -> None:
        nonlocal next_line
        now = time.monotonic()
        if name not in began or done < began[name][1]:
            began[name] = now, done
        start, first = began[name]
        if now < next_line and name != "metrics":
            return
        next_line = now + _SECONDS_BETWEEN_LINES
        left = ""
        if first < done < total:
            seconds = round((now - start) / (done - first) * (total - done))
            left = f", {datetime.timedelta(seconds=seconds)} left"
        say(console, f"{name} {done}/{total}{left}")

    return show
