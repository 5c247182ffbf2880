"""Pictures of a run: sample grids and training curves, as PNG."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from matplotlib.figure import Figure
from matplotlib.text import Text

from atebm_jax.names import printable


def subplots(
    rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **options: Any
) -> tuple[Figure, Any]:
    """`pyplot.subplots` without pyplot: a notebook keeps its way to show figures."""
    figure = Figure(figsize=figsize)
    return figure, figure.subplots(rows, columns, **options)


def sample_grid(
    path: epath.Path,
    rows_of_samples: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    num_classes: int,
    num_rows: int,
    class_names: Sequence[str] | None = None,
) -> None:
    """One column a class; one block of rows for each set of samples, from the top.

    Args:
      path: the PNG file.
      rows_of_samples: title -> (images [N, H, W, C] in [0, 1], labels [N]).
      num_classes: K; at most 20 columns are drawn.
      num_rows: rows a block.
      class_names: K names for the columns, default their numbers.
    """
    columns = min(num_classes, 20)
    blocks = list(rows_of_samples.items())
    figure, axes = subplots(
        len(blocks), 1, figsize=(0.7 * columns, (0.7 * num_rows + 0.5) * len(blocks))
    )
    for axis, (title, (images, labels)) in zip(
        np.atleast_1d(axes), blocks, strict=True
    ):
        canvas = _tile(images, labels, columns, num_rows)
        grey = canvas.shape[-1] == 1
        axis.imshow(
            canvas[..., 0] if grey else canvas,
            cmap="gray" if grey else None,
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        axis.set_title(title, fontsize=9)
        width = images.shape[2] + 1
        names = class_names or [str(k) for k in range(num_classes)]
        axis.set_xticks(
            [(k + 0.5) * width for k in range(columns)],
            [printable(names[k]) for k in range(columns)],
            fontsize=7,
        )
        as_they_are(axis.get_xticklabels())
        axis.set_yticks([])
        axis.tick_params(length=0)
    save(figure, path)


def training_curves(path: epath.Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Losses, T, AUC, scores and held-out evaluation over the steps of both stages.

    A line marks where a sign of a dying network, or of one that has nothing left to
    learn from, was seen.

    Args:
      path: the PNG file.
      records: the lines of `metrics.jsonl`.
    """
    panels = {
        "losses": ("loss_ce", "loss_bce"),
        "T (contrastive steps)": ("T",),
        "AUC, real against": ("auc", "auc_seeds"),
        "mean score s(x)": ("score_real", "score_contrastive", "score_seeds"),
        "held-out accuracy": ("eval_clean_accuracy", "eval_robust_accuracy"),
        "sample distance": ("eval_sample_distance",),
    }
    figure, axes = subplots(2, 3, figsize=(13, 6.5))
    starts = _stage_starts(records)
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=True):
        for name in names:
            points = [
                (starts[r["stage"]] + r["step"], r[name]) for r in records if name in r
            ]
            if points:
                marker = "o-" if name.startswith("eval_") else "-"
                axis.plot(*zip(*points, strict=True), marker, label=name, markersize=3)
        for stage, start in starts.items():
            _mark(axis, start, f" {stage}", color="grey")
        for step, sign in _signs(records, starts):
            _mark(axis, step, f" {sign}", color="red", rotation=90)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        if axis.lines and axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    save(figure, path)


def _mark(axis: Any, step: int, text: str, *, color: str, rotation: int = 0) -> None:
    """A vertical line with a word at its upper end."""
    axis.axvline(step, color=color, linewidth=0.5)
    axis.text(
        step,
        1.0,
        text,
        fontsize=7,
        va="top",
        color=color,
        rotation=rotation,
        transform=axis.get_xaxis_transform(),
    )


def _signs(
    records: Sequence[Mapping[str, Any]], starts: Mapping[str, int]
) -> list[tuple[int, str]]:
    """(step on the common axis, name) of each sign of `atebm_jax.health`."""
    return [
        (starts[record["stage"]] + step, name.removeprefix("sign_"))
        for record in records
        for name, step in record.items()
        if name.startswith("sign_")
    ]


def _stage_starts(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Where each stage begins on a common axis of steps."""
    starts: dict[str, int] = {}
    end = 0
    for stage in sorted({r["stage"] for r in records}):
        starts[stage] = end
        end += max(r["step"] for r in records if r["stage"] == stage)
    return starts


def _tile(
    images: np.ndarray, labels: np.ndarray, columns: int, num_rows: int
) -> np.ndarray:
    height, width, channels = images.shape[1:]
    canvas = np.ones((num_rows * (height + 1), columns * (width + 1), channels))
    for column in range(columns):
        for row, image in enumerate(images[labels == column][:num_rows]):
            top, left = row * (height + 1), column * (width + 1)
            canvas[top : top + height, left : left + width] = image
    return np.nan_to_num(canvas)


def as_they_are(texts: Iterable[Any]) -> None:
    """Names of files and classes are no formulas: "$" is a dollar."""
    for text in texts:
        text.set_parse_math(False)


def save(figure: Figure, path: epath.Path) -> None:
    """Writes a figure as PNG; only the first process writes."""
    if jax.process_index() != 0:
        return
    # Names of classes and data sets are no formulas: "$" is a dollar.
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.tight_layout()
        with path.open("wb") as file:
            figure.savefig(file, dpi=110, format="png")
