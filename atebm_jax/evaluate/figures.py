"""Plots of the evaluation, one PNG each."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from atebm_jax.evaluate.plots import as_they_are, save, subplots
from atebm_jax.metrics import Reliability, roc_curve
from atebm_jax.names import printable


def reliability(path: epath.Path, diagrams: Mapping[str, Reliability]) -> None:
    """Accuracy against confidence in bins, one panel a diagram, with the counts."""
    figure, axes = subplots(1, len(diagrams), figsize=(4.2 * len(diagrams), 4))
    for axis, (title, diagram) in zip(np.atleast_1d(axes), diagrams.items()):
        widths = np.diff(diagram.edges)
        left = diagram.edges[:-1]
        heights = np.nan_to_num(diagram.accuracy)
        axis.bar(
            left, heights, widths, align="edge", edgecolor="white", label="accuracy"
        )
        axis.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
        axis.plot(diagram.confidence, diagram.accuracy, "k.", markersize=4)
        share = axis.twinx()
        share.stairs(diagram.counts / diagram.counts.sum(), diagram.edges, color="C1")
        share.set_ylim(0, 1)
        share.set_ylabel("share of images", color="C1", fontsize=8)
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        axis.set_title(f"{title}: ECE {diagram.expected_error:.3f}", fontsize=9)
    save(figure, path)


def robust_curve(
    path: epath.Path, curve: Mapping[float, Mapping[str, Any]], norm: str
) -> None:
    """Robust accuracy against the radius, with 95 % intervals."""
    radii = sorted(curve)
    values = np.array([curve[r]["value"] for r in radii])
    bounds = np.array([curve[r]["interval_95"] for r in radii])
    figure, axis = subplots(figsize=(5, 3.6))
    axis.plot(radii, values, "o-", markersize=4)
    axis.fill_between(radii, bounds[:, 0], bounds[:, 1], alpha=0.2)
    axis.set(xlabel=f"{norm} radius, pixels of a [0, 1] image", ylabel="accuracy")
    axis.set_ylim(0, 1)
    axis.set_title("accuracy under PGD, 95 % intervals", fontsize=9)
    save(figure, path)


def detection(
    path: epath.Path,
    name: str,
    scores: Sequence[str],
    inside: Mapping[str, np.ndarray],
    sets: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """Histograms above, ROC curves below, one column a score.

    Args:
      path: the PNG file.
      name: of the out-of-distribution set.
      scores: names of the scores.
      inside: score -> [N] of in-distribution images.
      sets: "clean" and "attacked" -> score -> [M] of the others.
    """
    figure, axes = subplots(2, len(scores), figsize=(3.3 * len(scores), 6))
    for column, score in enumerate(scores):
        top, bottom = axes[:, column]
        values = {"test": inside[score]} | {
            f"{name}, {moment}": rows[score] for moment, rows in sets.items()
        }
        low, high = np.quantile(np.concatenate(list(values.values())), [0.005, 0.995])
        edges = np.linspace(low, max(high, low + 1e-6), 40)
        for label, row in values.items():
            # Every image has its place: those beyond lie in the outermost bins.
            top.hist(
                np.clip(row, edges[0], edges[-1]),
                edges,
                density=True,
                alpha=0.5,
                label=label,
            )
        top.set_title(score, fontsize=9)
        top.set_yticks([])
        for moment, rows in sets.items():
            bottom.plot(*roc_curve(inside[score], rows[score]), label=moment)
        bottom.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
        bottom.set_xlabel("false positive rate", fontsize=8)
    as_they_are(axes[0, 0].legend(fontsize=7).get_texts())
    axes[1, 0].legend(fontsize=7)
    axes[1, 0].set_ylabel("true positive rate", fontsize=8)
    save(figure, path)


def strips(
    path: epath.Path, rows: Mapping[str, np.ndarray], columns_are: Sequence[str]
) -> None:
    """Rows of images [N, H, W, C] in [0, 1] below each other, each with its title."""
    columns = min(map(len, rows.values()))
    figure, axes = subplots(
        len(rows), columns, figsize=(0.9 * columns + 1.2, len(rows)), squeeze=False
    )
    for line, (title, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images[:columns], strict=True):
            grey = image.shape[-1] == 1
            axis.imshow(
                image[..., 0] if grey else image,
                cmap="gray" if grey else None,
                vmin=0,
                vmax=1,
                interpolation="nearest",
            )
            axis.set_axis_off()
        line[0].set_axis_on()
        line[0].set_frame_on(False)
        line[0].set_xticks([])
        line[0].set_yticks([])
        line[0].set_ylabel(title, fontsize=8, rotation=0, ha="right", va="center")
    for axis, title in zip(axes[0], columns_are):
        as_they_are([axis.set_title(printable(title), fontsize=7)])
    save(figure, path)


def sweep(path: epath.Path, distances: Mapping[int, float], name: str) -> None:
    """A distance of samples against the number of sampling steps."""
    steps = sorted(distances)
    figure, axis = subplots(figsize=(5, 3.6))
    axis.plot(steps, [distances[s] for s in steps], "o-", markersize=4)
    axis.set(xlabel="sampling steps", ylabel=name)
    save(figure, path)
