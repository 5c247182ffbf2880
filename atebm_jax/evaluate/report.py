"""Reports: `report.json` of a job, with its stages; those of an evaluation."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atebm_jax import storage
from atebm_jax.errors import UserError
from atebm_jax.names import printable

_CLASSES_SHOWN = 20
# Column title and number format of each figure of the table.
COLUMNS: dict[str, tuple[str, str]] = {
    "T": ("T", "{}"),
    "clean_accuracy": ("clean", "{:.4f}"),
    "robust_accuracy": ("robust (PGD)", "{:.4f}"),
    "sample_agreement": ("agreement", "{:.4f}"),
    "sample_distance": ("distance", "{:.3f}"),
}


def made_with(*packages: str) -> dict[str, Any]:
    """The versions of Python, this package and others, and the devices."""
    versions = {"python": platform.python_version()}
    for name in ("atebm_jax", *packages):
        versions[name] = importlib.metadata.version(name)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {"versions": versions, "device": device}


def write_stages(workdir: epath.Path, report: Mapping[str, Any]) -> None:
    """Writes `report.json`, whole or not at all."""
    storage.write_json(workdir / "report.json", report)


def read_stages(workdir: epath.Path) -> dict[str, Any] | None:
    """The report of an earlier run in a workdir; None if it is absent or damaged."""
    try:
        report = json.loads((workdir / "report.json").read_text())
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and "stages" in report else None


def show_stages(console: Console, report: Mapping[str, Any]) -> None:
    """Prints one row a stage, and what the figures mean below."""
    stages = report["stages"].values()
    columns = [name for name in COLUMNS if any(name in stage for stage in stages)]
    title = f"{report['data']['test']}, seed {report['seed']}"
    table = Table(title=Text(title, style="table.title"))
    table.add_column("after")
    for name in columns:
        table.add_column(COLUMNS[name][0], justify="right")
    rows = {f"{k} ({v['step']} steps)": v for k, v in report["stages"].items()}
    # The best that samples could reach.
    rows["(real images)"] = report["real_test"]
    for title, figures in rows.items():
        cells = [
            COLUMNS[name][1].format(figures[name]) if name in figures else "-"
            for name in columns
        ]
        table.add_row(*map(Text, (title, *cells)))
    console.print(table)
    for note in report["notes"]:
        console.print(Text(note))


def write_figures(folder: epath.Path, report: Mapping[str, Any]) -> None:
    """Writes `report.json`, `.md` and `.html`, or says why not with a `UserError`."""
    from atebm_jax.evaluate import html

    finite = _finite(report)
    with storage.writing(folder):
        storage.write_json(folder / "report.json", finite, allow_nan=False)
        storage.replace_text(folder / "report.md", markdown(report))
        whole = html.page([html.Evaluation("", finite, folder)])
        storage.replace_text(folder / html.FILE, whole)


def read_figures(folder: epath.Path) -> dict[str, Any]:
    """The report of an evaluation, from the folder that `write_figures` wrote to.

    Raises:
      UserError: there is none, it is damaged, or it names plots in other folders.
    """
    path = folder / "report.json"
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): give the folder that "
            "python -m atebm_jax.evaluate wrote to."
        ) from error
    try:
        markdown(report)  # has every field that is shown, or else it cannot be made
        wrong = [plot for plot in plots_of(report) if not _names_a_plot(plot)]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is no report of an evaluation, or not whole ({error!r}): give the "
            "folder that python -m atebm_jax.evaluate wrote to, WORKDIR/evaluation say."
        ) from error
    if wrong:
        raise UserError(
            f"{path} has the plot {wrong[0]!r}: expected the name of a .png file that "
            "lies beside it, without a folder; plots from elsewhere are not read."
        )
    return report


def plots_of(report: Mapping[str, Any]) -> list[str]:
    """File names of the plots of all metrics."""
    return [p for x in report["metrics"].values() for p in x.get("plots", ())]


def _names_a_plot(name: Any) -> bool:
    """A report may come from others: what it names must not be any file."""
    return (
        isinstance(name, str)
        and name.endswith(".png")
        and "/" not in name
        and name == printable(name)
    )


def facts(report: Mapping[str, Any]) -> list[str]:
    """What was measured on what, in sentences."""
    source, test = report["checkpoint"], report["data"]["test"]
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    return [
        f"Checkpoint {source['path']}, {source['stage']} step {source['step']}, "
        + f"averaged weights, SHA-256 {source['averaged_weights_sha256']}.",
        f"Test images: {test['num_images']} of {test['num_in_source']} of "
        + f"{test['source']}, {'x'.join(map(str, test['image_shape']))}, "
        + f"preprocessing {test['preprocess'] or 'none'}, SHA-256 {test['sha256']}.",
        f"Seed {report['seed']}; {report['device']}; {versions}.",
        *report["notes"],
    ]


def markdown(report: Mapping[str, Any], *, level: int = 1, folder: str = "") -> str:
    """The report as Markdown: table, protocol and plots of each metric.

    Args:
      report: as `read_figures` returns it.
      level: of its heading.
      folder: of the plots, with a slash at its end.
    """
    heading = "#" * level
    lines = [f"{heading} Evaluation", "", *(f"- {fact}" for fact in facts(report))]
    for name, result in report["metrics"].items():
        lines += ["", f"{heading}# {name}", ""]
        lines += ["| figure | value | 95 % interval | count |", "|---|---:|---:|---:|"]
        for row in _rows(result["figures"]):
            cells = (cell.replace("|", "&#124;") for cell in row)
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *(f"- {k}: {in_words(v)}" for k, v in result["protocol"].items())]
        lines += [
            f"- Frechet distance per class, {name}: {_classes(figures)}"
            for name, figures in result.get("per_class", {}).items()
        ]
        plots = result.get("plots", ())
        lines += [""] * bool(plots) + [f"![{plot}]({folder}{plot})" for plot in plots]
    # Names of folders may hold line breaks, which would end a row.
    return "\n".join(map(printable, lines)) + "\n"


def _classes(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Class, distance and number of images; of many classes the first ones."""
    shown = [
        f"{name} {figure['value']:.4f} ({figure['count']})"
        for name, figure in list(figures.items())[:_CLASSES_SHOWN]
    ]
    more = len(figures) - len(shown)
    return ", ".join(shown) + (f"; {more} more in report.json" if more else "")


def show_figures(console: Console, report: Mapping[str, Any]) -> None:
    """Prints a table of every figure."""
    table = Table("metric", "value", "95 % interval", "count")
    table.add_column("figure", overflow="fold")
    for name, result in report["metrics"].items():
        for index, row in enumerate(_rows(result["figures"])):
            cells = (name if index == 0 else "", *row[1:], row[0])
            table.add_row(*map(Text, cells))
        table.add_section()
    console.print(table)


def _rows(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for name, figure in figures.items():
        value, interval = value_in_words(figure), interval_in_words(figure)
        yield name, value, interval, str(figure.get("count", ""))


def value_in_words(figure: Mapping[str, Any]) -> str:
    """The value of a figure; null stands for one that was no number."""
    value = figure["value"]
    return "none" if value is None else f"{value:.4f}"


def interval_in_words(figure: Mapping[str, Any]) -> str:
    """The 95 % interval of a figure, "" where it has none."""
    low, high = figure.get("interval_95") or (None, None)
    return "" if low is None or high is None else f"{low:.4f} to {high:.4f}"


def in_words(value: Any) -> str:
    """A value of a protocol, as a person reads it."""
    if isinstance(value, Mapping):
        return "; ".join(f"{k} {in_words(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value)) or "none"
    return str(value) or "none"


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: null stands for them."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
