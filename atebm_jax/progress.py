"""Progress of a command: bars on a terminal, plain lines elsewhere.

Only the first process shows anything.
"""

import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from rich import progress
from rich.console import Console
from rich.text import Text

from atebm_jax.names import writable

# Shows the progress of a part: (name, batches done, batches in all).
ShowFn = Callable[[str, int, int], None]

# Seconds between two plain lines.
_BETWEEN_LINES_OF_TRAINING = 5.0
_BETWEEN_LINES_OF_PARTS = 10.0
_BETWEEN_LINES_OF_WAITING = 30.0


def say(console: Console, text: str) -> None:
    """Prints a line as it is, once for all processes.

    Print every text of a user (a path, a name) in this way, or as `Text` in a table:
    rich reads plain strings as markup, and "[bold]" is a possible name of a folder.
    """
    if jax.process_index() == 0:
        console.print(Text(writable(text)), soft_wrap=True)


def track(
    items: Iterable[Any], name: str, console: Console, total: int | None = None
) -> Iterable[Any]:
    """The items, with a bar that disappears after the last one."""
    return progress.track(
        items,
        name,
        total=total,
        console=console,
        transient=True,
        disable=not (console.is_terminal or console.is_jupyter),
    )


@contextlib.contextmanager
def waiting(console: Console, text: str) -> Iterator[None]:
    """Says that something long is going on, and for how long it has been."""
    if console.is_terminal:
        columns = progress.TextColumn("{task.description}", markup=False)
        elapsed = progress.TimeElapsedColumn()
        with progress.Progress(
            progress.SpinnerColumn(), columns, elapsed, console=console, transient=True
        ) as shown:
            shown.add_task(text, total=None)
            yield
        return
    begin, done = time.monotonic(), threading.Event()

    def tell() -> None:
        say(console, f"{text} ...")
        while not done.wait(_BETWEEN_LINES_OF_WAITING):
            say(console, f"{text}: {time.monotonic() - begin:.0f} s so far")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def _bars(
    console: Console, *more: progress.ProgressColumn, style: str = "none"
) -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}", style=style, markup=False),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        *more,
        console=console,
    )


# What the progress line calls losses; others go by their own names.
_LOSSES = {
    "loss_ce": "CE",
    "loss_bce": "BCE",
    "loss_energy": "s(x_q) - s(x)",
    "loss_uniform": "KL",
}


def losses_in(names: Iterable[str]) -> list[str]:
    """The terms of a method's loss among the metrics, the cross-entropy first."""
    found = {name for name in names if name.startswith("loss_")}
    return sorted(found, key=lambda name: (name != "loss_ce", name))


def _in_a_line(metrics: Mapping[str, float]) -> str:
    losses = {
        name: f"{_LOSSES.get(name, name.removeprefix('loss_'))} {{:.3f}}"
        for name in losses_in(metrics)
    }
    forms = {"T": "T {:.0f}", "auc": "AUC {:.2f}", **losses}
    forms["images_per_second"] = "{:.0f} img/s"
    return "  ".join(
        form.format(metrics[name]) for name, form in forms.items() if name in metrics
    )


class ProgressLine:
    """The step of a stage with its metrics."""

    def __init__(self, console: Console, stage: str, step: int, total: int):
        self._console, self._stage, self._total = console, stage, total
        self._bar: progress.Progress | None = None
        self._next_line = time.monotonic()
        if jax.process_index() == 0 and console.is_terminal:
            shown = progress.TextColumn("{task.fields[shown]}", markup=False)
            self._bar = _bars(console, shown, style="bold")
            self._task = self._bar.add_task(
                stage, completed=step, total=total, shown="compiling"
            )
            self._bar.start()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics of a step."""
        shown = _in_a_line(metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, shown=shown)
        elif time.monotonic() >= self._next_line:
            say(self._console, f"{self._stage} step {step}/{self._total}  {shown}")
            self._next_line = time.monotonic() + _BETWEEN_LINES_OF_TRAINING

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        say(self._console, text)

    def close(self) -> None:
        """Leaves the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.stop()


@contextlib.contextmanager
def parts(console: Console) -> Iterator[ShowFn]:
    """Shows the parts of an evaluation, each with the time that it still needs."""
    if jax.process_index() != 0:
        yield lambda name, done, total: None
    elif console.is_terminal:
        with _bars(console) as bars:
            yield _on_bars(bars)
    else:
        yield _in_lines(console)


def _on_bars(bars: progress.Progress) -> ShowFn:
    tasks: dict[str, progress.TaskID] = {}

    def show(name: str, done: int, total: int) -> None:
        if name not in tasks:
            tasks[name] = bars.add_task(name, total=total)
        # A finished part disappears.
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
        next_line = now + _BETWEEN_LINES_OF_PARTS
        left = ""
        if first < done < total:
            seconds = round((now - start) / (done - first) * (total - done))
            left = f", {datetime.timedelta(seconds=seconds)} left"
        say(console, f"{name} {done}/{total}{left}")

    return show
