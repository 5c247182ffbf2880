"""Strips: an image, what became of it, the difference, and the way there, as PNG."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from atebm_jax.sample import files

_PANEL_INCHES = 1.9
_CURVE_INCHES = 3.6
_DPI = 130
# Rows of one strip: more go into another, as pictures have a largest height.
ROWS = 24


class Row(NamedTuple):
    """One line of a strip.

    Attributes:
      pictures: title -> image [H, W, C] in [0, 1], from the left.
      change: [H, W, C], what was added to the image; shown after the pictures.
      curves: label -> [T + 1] probabilities.
      energy: [T + 1].
      hole: [H, W] bool, shown on the first picture; None for none.
    """

    pictures: Mapping[str, np.ndarray]
    change: np.ndarray
    curves: Mapping[str, np.ndarray]
    energy: np.ndarray
    hole: np.ndarray | None = None


def write(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Draws rows below each other; the scale of the differences is that of all."""
    panels = len(rows[0].pictures) + 1
    widths = [1.0] * panels + [_CURVE_INCHES / _PANEL_INCHES]
    width = _PANEL_INCHES * panels + _CURVE_INCHES + 0.6
    height = (_PANEL_INCHES + 0.35) * len(rows) + 0.35
    # Without pyplot, as in `evaluate.plots`.
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(len(rows), panels + 1, squeeze=False, width_ratios=widths)
    # Names of files and classes are no formulas: "$" is a dollar.
    figure.suptitle(title, fontsize=10, parse_math=False)
    scale = max(float(np.abs(row.change).max()) for row in rows) or 1.0
    for line, row in zip(axes, rows, strict=True):
        for axis, (name, image) in zip(line, row.pictures.items()):
            _picture(axis, image, name)
        if row.hole is not None:
            _shade(line[0], row.hole)
        _difference(figure, line[panels - 1], row.change, scale)
        _way(line[panels], row.curves, row.energy)
    with warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes; the file's name has them.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        files.replace(path, lambda p: figure.savefig(p, dpi=_DPI, format="png"))


def _picture(axis: Any, image: np.ndarray, title: str) -> None:
    grey = image.shape[-1] == 1
    axis.imshow(
        image[..., 0] if grey else image,
        cmap="gray" if grey else None,
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    axis.set_title(title, fontsize=8, parse_math=False)
    axis.set_xticks([])
    axis.set_yticks([])


def _shade(axis: Any, hole: np.ndarray) -> None:
    """Tints the pixels that may change."""
    tint = np.zeros((*hole.shape, 4), np.float32)
    tint[hole] = (0.9, 0.25, 0.1, 0.55)
    axis.imshow(tint, interpolation="nearest")


def _difference(figure: Any, axis: Any, change: np.ndarray, scale: float) -> None:
    """Red where brighter, blue where darker; of colour images each channel by itself.

    Colour: grey where nothing changed, a channel stronger or weaker than grey where it
    rose or fell.
    """
    if change.shape[-1] == 1:
        shown = axis.imshow(
            change[..., 0],
            cmap="RdBu_r",
            vmin=-scale,
            vmax=scale,
            interpolation="nearest",
        )
        bar = figure.colorbar(shown, ax=axis, fraction=0.046, pad=0.03)
        bar.ax.tick_params(labelsize=6)
        title = "change, red: brighter"
    else:
        axis.imshow(np.clip(0.5 + 0.5 * change / scale, 0, 1), interpolation="nearest")
        title = f"change, grey: none,\nfull colour: {scale:.2g}"
    axis.set_title(title, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])


def _way(axis: Any, curves: Mapping[str, np.ndarray], energy: np.ndarray) -> None:
    """Probabilities on the left axis, the energy on the right one, over the steps."""
    for name, values in curves.items():
        axis.plot(values, label=name, linewidth=1.4)
    axis.set_ylim(-0.03, 1.03)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("step", fontsize=7)
    axis.set_ylabel("confidence", fontsize=7)
    axis.tick_params(labelsize=6)
    right = axis.twinx()
    right.plot(energy, ":", color="black", linewidth=1.2, label="energy (right)")
    right.tick_params(labelsize=6)
    handles = axis.get_legend_handles_labels()
    handles = [a + b for a, b in zip(handles, right.get_legend_handles_labels())]
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "frameon": False}
    legend = axis.legend(*handles, fontsize=7, ncols=len(handles[0]), **above)
    for text in legend.get_texts():
        text.set_parse_math(False)
