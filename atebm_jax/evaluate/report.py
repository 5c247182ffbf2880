"""The report at the end of a job: `report.json` and a table on the terminal."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atebm_jax import storage

# Column title and number format of each figure of the table.
COLUMNS: dict[str, tuple[str, str]] = {
    "T": ("T", "{}"),
    "clean_accuracy": ("clean", "{:.4f}"),
    "robust_accuracy": ("robust (PGD)", "{:.4f}"),
    "sample_agreement": ("agreement", "{:.4f}"),
    "sample_distance": ("distance", "{:.3f}"),
}


def write(workdir: epath.Path, report: Mapping[str, Any]) -> None:
    """Writes `report.json`, whole or not at all."""
    storage.write_json(workdir / "report.json", report)


def read(workdir: epath.Path) -> dict[str, Any] | None:
    """The report of an earlier run of the same workdir; None if there is none whole."""
    try:
        report = json.loads((workdir / "report.json").read_text())
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and "stages" in report else None


def show(console: Console, report: Mapping[str, Any]) -> None:
    """Prints one row a stage, and what the figures mean below."""
    columns = [
        name
        for name in COLUMNS
        if any(name in stage for stage in report["stages"].values())
    ]
    title = f"{report['data']['test']}, seed {report['seed']}"
    table = Table(title=Text(title, style="table.title"))
    table.add_column("after")
    for name in columns:
        table.add_column(COLUMNS[name][0], justify="right")
    rows = {
        f"{stage} ({figures['step']} steps)": figures
        for stage, figures in report["stages"].items()
    }
    # What samples could reach: the scores of real held-out images.
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
