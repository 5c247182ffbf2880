"""Pictures, as PNG: grids of samples, rows of images, strips, curves and diagrams."""

import io
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from atebm_jax import storage
from atebm_jax.data.decoding import to_pillow
from atebm_jax.metrics import Reliability, roc_curve
from atebm_jax.names import printable
from atebm_jax.progress import losses_in


def png(image: np.ndarray) -> bytes:
    """The file of an image [H, W, C] uint8, pixel for pixel."""
    stream = io.BytesIO()
    to_pillow(image).save(stream, format="PNG")
    return stream.getvalue()


def _figure(
    rows: int, columns: int, figsize: tuple[float, float], **options: Any
) -> tuple[Figure, np.ndarray]:
    """As `pyplot.subplots`, without it: a notebook keeps its way to show figures."""
    figure = Figure(figsize=figsize)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _save(figure: Figure, path: epath.Path, dpi: int = 110) -> None:
    """Writes a figure as PNG; only the first process writes."""
    if jax.process_index() == 0:
        storage.replace_bytes(path, _file(figure, dpi))


def _file(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as PNG."""
    # Names of classes and data sets are no formulas: "$" is a dollar.
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    stream = io.BytesIO()
    with warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        if figure.get_layout_engine() is None:
            figure.tight_layout()
        figure.savefig(stream, dpi=dpi, format="png")
    return stream.getvalue()


def _show(axis: Any, image: np.ndarray, title: str = "", **options: Any) -> Any:
    """An image [H, W, C] in [0, 1], its pixels as they are, without a scale."""
    axis.set_title(title, fontsize=8)
    axis.set(xticks=[], yticks=[])
    # Colour images have no use for these.
    options = {"cmap": "gray", "vmin": 0, "vmax": 1} | options
    shown = image[..., 0] if image.shape[-1] == 1 else image
    return axis.imshow(shown, interpolation="nearest", **options)


# --- Grids ---

# Shorter images are enlarged to about so many pixels.
_SHEET_PIXELS = 48


def contact_sheet(images: np.ndarray) -> np.ndarray:
    """Images [N, H, W, C] uint8 row by row in a square, enlarged by whole pixels."""
    columns = math.ceil(math.sqrt(len(images)))
    places = [divmod(index, columns) for index in range(len(images))]
    sheet = _tiled(images, places, -(-len(images) // columns), columns)
    factor = max(1, round(_SHEET_PIXELS / max(images.shape[1:3])))
    return sheet.repeat(factor, axis=0).repeat(factor, axis=1)


def _tiled(
    images: np.ndarray, places: Iterable[tuple[int, int]], rows: int, columns: int
) -> np.ndarray:
    """Images [N, H, W, C] at (row, column) of a white canvas, a line between them."""
    height, width, channels = images.shape[1:]
    white = 255 if images.dtype == np.uint8 else 1
    shape = (rows, height + 1, columns, width + 1, channels)
    canvas = np.full(shape, white, images.dtype)
    for image, (row, column) in zip(images, places, strict=True):
        canvas[row, :height, column, :width] = image
    return canvas.reshape(rows * (height + 1), columns * (width + 1), channels)


def sample_grid(
    path: epath.Path,
    rows_of_samples: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    num_classes: int,
    num_rows: int,
    class_names: Sequence[str] | None = None,
) -> None:
    """One column a class; one block of rows for each set of samples, from the top.

    A set is title -> (images [N, H, W, C] in [0, 1], labels [N]). At most 20 columns
    are drawn, with the names of their classes, by default their numbers.
    """
    columns, blocks = min(num_classes, 20), len(rows_of_samples)
    size = (0.7 * columns, (0.7 * num_rows + 0.5) * blocks)
    figure, axes = _figure(blocks, 1, size)
    names = class_names or [str(k) for k in range(num_classes)]
    for axis, (title, (images, labels)) in zip(axes.flat, rows_of_samples.items()):
        _show(axis, _by_class(images, labels, columns, num_rows))
        axis.set_title(title, fontsize=9)
        places = (np.arange(columns) + 0.5) * (images.shape[2] + 1)
        axis.set_xticks(places, list(map(printable, names[:columns])), fontsize=7)
        axis.tick_params(length=0)
    _save(figure, path)


def _by_class(
    images: np.ndarray, labels: np.ndarray, columns: int, num_rows: int
) -> np.ndarray:
    """The first images of each class in its column; black where they are not finite."""
    chosen = [np.flatnonzero(labels == k)[:num_rows] for k in range(columns)]
    places = [(row, k) for k, found in enumerate(chosen) for row in range(len(found))]
    shown = np.asarray(images, np.float64)[np.concatenate(chosen)]
    return np.nan_to_num(_tiled(shown, places, num_rows, columns))


def image_rows(
    path: epath.Path, rows: Mapping[str, np.ndarray], columns_are: Sequence[str]
) -> None:
    """Rows of images [N, H, W, C] in [0, 1] below each other, each with its title."""
    columns = min(map(len, rows.values()))
    figure, axes = _figure(len(rows), columns, (0.9 * columns + 1.2, len(rows)))
    for line, (title, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images[:columns], strict=True):
            _show(axis, image)
            axis.set_frame_on(False)
        line[0].set_ylabel(title, fontsize=8, rotation=0, ha="right", va="center")
    for axis, title in zip(axes[0], columns_are):
        axis.set_title(printable(title), fontsize=7)
    _save(figure, path)


# --- Strips: an image, what became of it, the difference, and the way there ---

# Rows of one strip: more go into another, as pictures have a largest height.
ROWS = 24
_PANEL_INCHES = 1.9
_CURVE_INCHES = 3.6


class Row(NamedTuple):
    """One line of a strip."""

    #: title -> image [H, W, C] in [0, 1], from the left
    pictures: Mapping[str, np.ndarray]
    #: [H, W, C], what was added to the image; shown after the pictures
    change: np.ndarray
    curves: Mapping[str, np.ndarray]  #: label -> [T + 1] probabilities
    energy: np.ndarray  #: [T + 1]
    #: [H, W] bool, shown on the first picture; None for none
    hole: np.ndarray | None = None


def strip(path: epath.Path, title: str, rows: Sequence[Row]) -> None:
    """Draws rows below each other; the scale of the differences is that of all."""
    panels = len(rows[0].pictures) + 1
    width = _PANEL_INCHES * panels + _CURVE_INCHES + 0.6
    height = (_PANEL_INCHES + 0.35) * len(rows) + 0.35
    ratios = [1.0] * panels + [_CURVE_INCHES / _PANEL_INCHES]
    figure, axes = _figure(len(rows), panels + 1, (width, height), width_ratios=ratios)
    figure.set_layout_engine("constrained")
    figure.suptitle(title, fontsize=10)
    scale = max(float(np.abs(row.change).max()) for row in rows) or 1.0
    for line, row in zip(axes, rows, strict=True):
        for axis, (name, image) in zip(line, row.pictures.items()):
            _show(axis, image, name)
        if row.hole is not None:
            # Tints the pixels that may change.
            tint = np.zeros((*row.hole.shape, 4), np.float32)
            tint[row.hole] = (0.9, 0.25, 0.1, 0.55)
            line[0].imshow(tint, interpolation="nearest")
        _difference(figure, line[panels - 1], row.change, scale)
        _way(line[panels], row.curves, row.energy)
    _save(figure, path, dpi=130)


def _difference(figure: Figure, axis: Any, change: np.ndarray, scale: float) -> None:
    """Grey images: red where brighter, blue where darker.

    Colour images: each channel is stronger or weaker than grey where it rose or fell.
    """
    if change.shape[-1] == 1:
        colours = {"cmap": "RdBu_r", "vmin": -scale, "vmax": scale}
        shown = _show(axis, change, "change, red: brighter", **colours)
        bar = figure.colorbar(shown, ax=axis, fraction=0.046, pad=0.03)
        bar.ax.tick_params(labelsize=6)
    else:
        title = f"change, grey: none,\nfull colour: {scale:.2g}"
        _show(axis, difference(change, scale), title)


def difference(change: np.ndarray, scale: float | None = None) -> np.ndarray:
    """What was added to an image, as an image [H, W, 3] uint8.

    Args:
      change: [H, W, C]. Of colours, each is stronger or weaker than grey where it rose
        or fell; grey images become red where brighter, blue where darker.
      scale: the change that is shown in full colour; default the largest.
    """
    scale = scale or float(np.abs(change).max()) or 1.0
    shown = np.clip(0.5 + 0.5 * change / scale, 0, 1)
    if change.shape[-1] == 1:
        shown = colormaps["RdBu_r"](shown[..., 0])[..., :3]
    return (255 * shown).round().astype(np.uint8)


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
    axis.legend(*handles, fontsize=7, ncols=len(handles[0]), **above)


# --- Diagrams of a page: legible on light and dark grounds ---

_ON_ANY_GROUND = "#8b919a"


def way(curves: Mapping[str, np.ndarray], energy: np.ndarray) -> bytes:
    """The PNG file of probabilities [T + 1] by label and the energy over the steps."""
    figure, axes = _figure(1, 1, (5.6, 3.2))
    _way(axes[0, 0], curves, energy)
    return _transparent(figure)


def energies(sets: Mapping[str, np.ndarray], here: float) -> bytes:
    """The PNG file of histograms of energies [N] by label, and where one image lies."""
    figure, axes = _figure(1, 1, (7.6, 3.4))
    axis = axes[0, 0]
    _histograms(axis, sets, here, bins=49, alpha=0.6)
    axis.axvline(here, color="C3", linewidth=2, label="this image")
    axis.set_xlabel("energy E(x), lower is likelier", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=8, frameon=False)
    return _transparent(figure)


def _histograms(
    axis: Any, sets: Mapping[str, np.ndarray], *seen: float, bins: int, alpha: float
) -> None:
    """Histograms of values [N] by label, as wide as all that must be seen."""
    low, high = np.quantile(np.concatenate(list(sets.values())), [0.005, 0.995])
    edges = np.linspace(min([low, *seen]), max([high, low + 1e-6, *seen]), bins + 1)
    for label, row in sets.items():
        # Every image has its place: those beyond lie in the outermost bins.
        inner = np.clip(row, edges[0], edges[-1])
        axis.hist(inner, edges, density=True, alpha=alpha, label=label)
    axis.set_yticks([])


def _transparent(figure: Figure) -> bytes:
    """A figure without a ground, everything black in a grey that is seen on both."""
    figure.patch.set_alpha(0)
    for axis in figure.axes:
        axis.patch.set_alpha(0)
        axis.tick_params(colors=_ON_ANY_GROUND)
        axis.spines[:].set_color(_ON_ANY_GROUND)
    for line in figure.findobj(Line2D):
        if line.get_color() == "black":
            line.set_color(_ON_ANY_GROUND)
    for text in figure.findobj(Text):
        text.set_color(_ON_ANY_GROUND)
    return _file(figure, dpi=140)


# --- Curves ---


def curve(
    path: epath.Path,
    values: Mapping[int, float] | Mapping[float, float],
    named: tuple[str, str],
    *,
    bounds: Mapping[float, Sequence[float]] | None = None,
    title: str = "",
) -> None:
    """A line through measured points: place on the axis -> value.

    Args:
      path, values, title: of the PNG file, what to draw, and above it.
      named: what places and values are.
      bounds: place -> (low, high) of a share in [0, 1], shaded.
    """
    places, heights = zip(*sorted(values.items()), strict=True)
    figure, axes = _figure(1, 1, (5, 3.6))
    axis = axes[0, 0]
    axis.plot(places, heights, "o-", markersize=4)
    axis.set(xlabel=named[0], ylabel=named[1])
    axis.set_title(title, fontsize=9)
    if bounds is not None:
        low, high = zip(*(bounds[place] for place in places), strict=True)
        axis.fill_between(places, low, high, alpha=0.2)
        axis.set_ylim(0, 1)
    _save(figure, path)


class Line(NamedTuple):
    """A line of a panel; lines of one label share its place in the legend."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    marker: str = ""  #: "o", say, at every point
    style: str = "-"  #: "--", say, for a broken line
    crossed: bool = False  #: whether the last point is marked by a cross


def panels(
    path: epath.Path,
    lines: Mapping[str, Sequence[Line]],
    named: tuple[str, str],
    logarithmic: Sequence[str] = (),
) -> None:
    """Panels of many lines beside each other: title of a panel -> its lines.

    `named` says what x and y are; y is logarithmic, near zero linear, in some panels.
    """
    figure, axes = _figure(1, len(lines), (4.5 * len(lines) + 0.5, 3.8))
    for axis, (title, drawn) in zip(axes.flat, lines.items(), strict=True):
        for line in drawn:
            axis.plot(
                line.x,
                line.y,
                color=line.colour,
                label=line.label,
                linestyle=line.style,
                linewidth=0.8,
                marker=line.marker,
                alpha=0.7 if line.marker else 1.0,
            )
            if line.crossed and len(line.x):
                axis.plot(line.x[-1], line.y[-1], "x", color=line.colour, markersize=9)
        if title in logarithmic:
            axis.set_yscale("symlog")
            # Its own labels are formulas, which `_file` does not read.
            axis.yaxis.set_major_formatter("{x:g}")
        axis.set(xlabel=named[0], ylabel=named[1])
        axis.set_title(title, fontsize=9)
        handles, labels = axis.get_legend_handles_labels()
        once = dict(zip(labels, handles))
        if once:
            axis.legend(once.values(), once.keys(), fontsize=7)
    _save(figure, path)


def training_curves(path: epath.Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Losses, T, AUC, scores and held-out evaluation over the steps of all stages.

    Lines mark where a stage begins and where a sign of `atebm_jax.health` was seen.
    Records are the lines of `metrics.jsonl`.
    """
    panels = {
        "losses": losses_in(name for record in records for name in record),
        "T (contrastive steps)": ("T",),
        "AUC of real images": ("auc", "auc_seeds"),
        "mean score s(x)": ("score_real", "score_contrastive", "score_seeds"),
        "held-out accuracy": ("eval_clean_accuracy", "eval_robust_accuracy"),
        "sample distance": ("eval_sample_distance",),
    }
    figure, axes = _figure(2, 3, (13, 6.5))
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
        for record in records:
            for name, step in record.items():
                if name.startswith("sign_"):
                    place = starts[record["stage"]] + step
                    sign = name.removeprefix("sign_")
                    _mark(axis, place, f" {sign}", color="red", rotation=90)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        if axis.lines and axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    _save(figure, path)


def _mark(axis: Any, step: int, text: str, *, color: str, rotation: int = 0) -> None:
    """A vertical line with a word at its upper end."""
    axis.axvline(step, color=color, linewidth=0.5)
    style = {"fontsize": 7, "va": "top", "color": color, "rotation": rotation}
    axis.text(step, 1.0, text, transform=axis.get_xaxis_transform(), **style)


def _stage_starts(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Where each stage begins on a common axis of steps."""
    starts: dict[str, int] = {}
    end = 0
    for stage in sorted({r["stage"] for r in records}):
        starts[stage] = end
        end += max(r["step"] for r in records if r["stage"] == stage)
    return starts


def reliability(path: epath.Path, diagrams: Mapping[str, Reliability]) -> None:
    """Accuracy against confidence in bins, one panel a diagram, with the counts."""
    figure, axes = _figure(1, len(diagrams), (4.2 * len(diagrams), 4))
    for axis, (title, diagram) in zip(axes.flat, diagrams.items()):
        left, widths = diagram.edges[:-1], np.diff(diagram.edges)
        heights = np.nan_to_num(diagram.accuracy)
        axis.bar(left, heights, widths, align="edge", edgecolor="white")
        axis.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
        axis.plot(diagram.confidence, diagram.accuracy, "k.", markersize=4)
        share = axis.twinx()
        share.stairs(diagram.counts / diagram.counts.sum(), diagram.edges, color="C1")
        share.set_ylim(0, 1)
        share.set_ylabel("share of images", color="C1", fontsize=8)
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        axis.set_title(f"{title}: ECE {diagram.expected_error:.3f}", fontsize=9)
    _save(figure, path)


def risk_coverage(
    path: epath.Path,
    curves: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
) -> None:
    """Error against the share that is answered, one panel a moment.

    Curves are title -> name of a score -> as of `metrics.risk_coverage`.
    """
    figure, axes = _figure(1, len(curves), (4.2 * len(curves), 3.6))
    for axis, (title, scores) in zip(axes.flat, curves.items()):
        for name, (coverage, risk) in scores.items():
            axis.plot(coverage, risk, label=f"{name}, area {risk.mean():.3f}")
        axis.set(xlim=(0, 1), ylim=(0, None), xlabel="coverage", ylabel="error")
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=7)
    _save(figure, path)


def detection(
    path: epath.Path,
    name: str,
    scores: Sequence[str],
    inside: Mapping[str, np.ndarray],
    sets: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """Histograms above, ROC curves below, one column a score.

    Args:
      path, name: of the PNG file, and of the out-of-distribution set.
      scores: their names.
      inside: score -> [N] of in-distribution images.
      sets: "clean" and "attacked" -> score -> [M] of the others.
    """
    figure, axes = _figure(2, len(scores), (3.3 * len(scores), 6))
    for score, top, bottom in zip(scores, *axes, strict=True):
        values = {"test": inside[score]} | {
            f"{name}, {moment}": rows[score] for moment, rows in sets.items()
        }
        _histograms(top, values, bins=39, alpha=0.5)
        top.set_title(score, fontsize=9)
        for moment, rows in sets.items():
            bottom.plot(*roc_curve(inside[score], rows[score]), label=moment)
        bottom.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
        bottom.set_xlabel("false positive rate", fontsize=8)
    axes[0, 0].legend(fontsize=7)
    axes[1, 0].legend(fontsize=7)
    axes[1, 0].set_ylabel("true positive rate", fontsize=8)
    _save(figure, path)
