"""Evaluations as one HTML file: tables that sort, pictures inside, nothing to load.

Several evaluations stand side by side where their figures mean the same.
"""

import base64
import itertools
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from etils import epath

from atebm_jax import storage
from atebm_jax.config import flatten
from atebm_jax.errors import UserError
from atebm_jax.evaluate import report as reports
from atebm_jax.local_path import HUB
from atebm_jax.model_names import located
from atebm_jax.names import printable

FILE = "report.html"


class Evaluation(NamedTuple):
    """name: "" for a single one; report: of `report.json`; folder: of its plots."""

    name: str
    report: Mapping[str, Any]
    folder: epath.Path


def compare(places: Sequence[str], metrics: Sequence[str], out: epath.Path) -> None:
    """Writes several evaluations into one file, side by side.

    Args:
      places: NAME=FOLDER or FOLDER of each: where `evaluate` wrote to, a workdir or a
        release.
      metrics: names of those to show; empty for all.
      out: folder of the file.

    Raises:
      UserError: fewer than two, one that cannot be read or has no metric in common
        with the others, two that measured differently (the field is named), or the
        file cannot be written.
    """
    named = [_parted(place) for place in places]
    names = [name for name, _ in named]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise UserError(
            f"--compare={','.join(places)}: give two or more evaluations, each once, "
            "as FOLDER or NAME=FOLDER."
        )
    evaluations = [_read(name, place, metrics) for name, place in named]
    _check_none_alone(evaluations)
    for one, other in itertools.combinations(evaluations, 2):
        _check_comparable(one, other)
    text = page(evaluations)
    with storage.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        storage.replace_text(out / FILE, text)


def _parted(place: str) -> tuple[str, str]:
    """Name and folder; a folder may have a "=" too, and a name has no slash."""
    name, _, folder = place.partition("=")
    if not folder or "/" in name:
        return place, place
    return name or folder, folder


def _read(name: str, place: str, metrics: Sequence[str]) -> Evaluation:
    if place.startswith(HUB):
        raise UserError(
            f"{printable(place)}: a name on a hub stands for weights alone; fetch the "
            "release with its evaluation, and give its folder."
        )
    folder = located(place)
    if (folder / "evaluation" / "report.json").exists():
        folder = folder / "evaluation"
    report = reports.read_figures(folder)
    missing = [m for m in metrics if m not in report["metrics"]]
    if missing:
        raise UserError(
            f"the evaluation in {folder} has no metric {missing[0]!r}: it has "
            f"{', '.join(report['metrics'])}."
        )
    wanted = {k: x for k, x in report["metrics"].items() if not metrics or k in metrics}
    return Evaluation(name, report | {"metrics": wanted}, folder)


# What may differ: where the same images lie, and remarks.
_MAY_DIFFER = {"source", "num_in_source", "notes"}
# How a model is sampled is its own choice, as its weights are.
_OWN_CHOICE = {"seeds", "sampler", "step_size", "num_steps", "sweep", "sweep_samples"}
_OWN_CHOICE |= {"undecodable_seeds"}


def _check_none_alone(evaluations: Sequence[Evaluation]) -> None:
    """Refuses an evaluation that has nothing beside it."""
    for one in evaluations:
        others = [e for e in evaluations if e is not one]
        if not any(_common(one, other) for other in others):
            raise UserError(
                f"{one.name} has no metric in common with "
                f"{', '.join(e.name for e in others)}: evaluate it with one of theirs, "
                "or leave it out."
            )


def _common(one: Evaluation, other: Evaluation) -> list[str]:
    return [m for m in one.report["metrics"] if m in other.report["metrics"]]


def _check_comparable(one: Evaluation, other: Evaluation) -> None:
    """Refuses two evaluations whose figures do not mean the same."""
    common = _common(one, other)
    before, after = (_decisive(x.report, common) for x in (one, other))
    for field in {**before, **after}:
        if before.get(field) != after.get(field):
            raise UserError(
                f"{one.name} and {other.name} cannot be compared: {field} is "
                f"{before.get(field, 'absent')!r} and {after.get(field, 'absent')!r}; "
                "evaluate both alike, or show other metrics with --metrics."
            )


def _decisive(report: Mapping[str, Any], metrics: Iterable[str]) -> dict[str, Any]:
    """Fields that must be equal where figures are compared."""
    fields = dict(flatten({"data": report["data"]}))
    for metric in metrics:
        own = dict(flatten(report["metrics"][metric]["protocol"], f"{metric}."))
        if metric == "generation":
            own = {k: x for k, x in own.items() if k.split(".")[1] not in _OWN_CHOICE}
        fields |= own
    return {
        name: value
        for name, value in fields.items()
        if name.rpartition(".")[2] not in _MAY_DIFFER
    }


def page(evaluations: Sequence[Evaluation]) -> str:
    """The whole file."""
    title = " · ".join(["Evaluation", *(e.name for e in evaluations if e.name)])
    metrics = dict.fromkeys(m for e in evaluations for m in e.report["metrics"])
    links = "".join(f'<a href="#{_text(m)}">{_text(m)}</a>' for m in metrics)
    sections = "".join(_section(metric, evaluations) for metric in metrics)
    facts = "".join(map(_facts, evaluations))
    here = epath.Path(__file__).parent
    style, script = ((here / f"report.{e}").read_text() for e in ("css", "js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{style}</style></head><body>"
        f"<header><h1>Evaluation</h1><nav>{links}</nav></header>"
        f'<main><div class="facts">{facts}</div>{sections}</main>'
        f"<script>{script}</script></body></html>\n"
    )


def _facts(evaluation: Evaluation) -> str:
    items = "".join(
        f"<li>{_text(fact)}</li>" for fact in reports.facts(evaluation.report)
    )
    heading = f"<h2>{_text(evaluation.name)}</h2>" * bool(evaluation.name)
    return f"<article>{heading}<ul>{items}</ul></article>"


def _section(metric: str, evaluations: Sequence[Evaluation]) -> str:
    """Table, protocol and pictures of a metric."""
    measured = [e for e in evaluations if metric in e.report["metrics"]]
    results = {e.name: e.report["metrics"][metric] for e in measured}
    parts = [f'<section id="{_text(metric)}"><h2>{_text(metric)}</h2>']
    parts.append(_table(results, len(evaluations) > 1))
    for e in measured:
        heading = f" of {_text(e.name)}" * bool(e.name)
        items = "".join(
            f"<dt>{_text(k)}</dt><dd>{_text(reports.in_words(v))}</dd>"
            for k, v in results[e.name]["protocol"].items()
        )
        parts.append(
            f"<details><summary>Protocol{heading}</summary><dl>{items}</dl></details>"
        )
    shown = "".join(_pictures(e, results[e.name]) for e in measured)
    parts.append(f'<div class="pictures">{shown}</div>' * bool(shown))
    return "".join([*parts, "</section>"])


def _table(results: Mapping[str, Any], together: bool) -> str:
    """Values of several evaluations, a column each; or of one, with all about it."""
    figures = [result["figures"] for result in results.values()]
    names = dict.fromkeys(name for own in figures for name in own)
    if together:
        titles = ["figure", *results]
        rows = [[_name(n), *(_in_short(own.get(n)) for own in figures)] for n in names]
    else:
        titles = ["figure", "value", "95 % interval", "count"]
        rows = [[_name(n), *_in_full(figures[0][n])] for n in names]
    head = "".join(
        f'<th aria-sort="none"><button>{_text(title)}</button></th>' for title in titles
    )
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _name(text: str) -> str:
    return f'<th scope="row">{_text(text)}</th>'


def _in_full(figure: Mapping[str, Any]) -> list[str]:
    """Three cells: value, interval (which sorts by its lower end), count."""
    interval, count = figure.get("interval_95"), figure.get("count")
    return [
        _cell(reports.value_in_words(figure), figure["value"]),
        _cell(reports.interval_in_words(figure), interval and interval[0]),
        _cell("" if count is None else str(count), count),
    ]


def _in_short(figure: Mapping[str, Any] | None) -> str:
    """One cell: the value, and its interval below."""
    if figure is None:
        return _cell("", None)
    words = _text(reports.interval_in_words(figure))
    small = f"<small>{words}</small>" * bool(words)
    return _cell(reports.value_in_words(figure), figure["value"], small)


def _cell(shown: str, value: float | None, more: str = "") -> str:
    """A cell that sorts by a number, or last without one."""
    known = "" if value is None else f' data-value="{_text(value)}"'
    return f"<td{known}>{_text(shown)}{more}</td>"


def _pictures(evaluation: Evaluation, result: Mapping[str, Any]) -> str:
    shown = []
    for plot in result.get("plots", ()):
        if (path := evaluation.folder / plot).exists():
            name = plot.removesuffix(".png").replace("_", " ")
            data = base64.b64encode(path.read_bytes()).decode()
            words = _text(", ".join(filter(None, [name, evaluation.name])))
            shown.append(
                f'<figure><img alt="{words}" src="data:image/png;base64,{data}">'
                f"<figcaption>{words}</figcaption></figure>"
            )
    return "".join(shown)


def _text(text: object) -> str:
    return escape(printable(str(text)))
