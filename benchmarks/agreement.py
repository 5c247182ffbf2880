"""Whether two sides compute the same: logits, images, losses and parameters.

Logits are continuous in rounding and held to a tight bound. Image gradients of a ReLU
network are not: rounding puts a few units on the other side of zero, the more the
larger the network, and from there an image's path goes its own way. What that amounts
to is measured: our loop and our step are run again from seeds and weights that differ
by some roundings, and the two sides may be a few times as far apart as that. In
float64 they agree to 1e-14 (`tests/test_benchmarks.py`).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from atebm_jax.errors import UserError

# Logits relative to the largest one, parameters relative to how far they moved
# (Euclidean), after two steps that begin with those paths: in WRN-34-10 one step
# without any attack, from equal losses, already differs by 5e-3, two steps with T 3 by
# 0.6. The tests hold a tiny network, which has no such units, to 1e-3.
BOUNDS = {
    "float32": {"logits": 1e-5, "params": 0.9, "average_params": 0.9},
    "bfloat16": {"logits": 0.05, "params": 0.9, "average_params": 0.9},
}
# Distance of the median image, as a share of the path T * step, and of the losses of
# two steps, absolute: allowed are so many times what rounding does, at least the first
# of the range and at most the second.
ROUNDING_FACTOR = 5.0
IMAGE_RANGE = (1e-3, 0.5)
LOSS_RANGES = {"float32": (0.02, 0.2), "bfloat16": (0.1, 0.2)}
METRICS = ("loss", "loss_ce", "loss_bce", "score_real", "score_contrastive")


def compare(
    ours: dict, other: dict, start: Any, config: ConfigDict
) -> dict[str, float]:
    """Differences between the results of two sides, by name.

    Args:
      ours, other: results of `check` of the two sides.
      start: parameters that both started from.
      config: the whole config.
    """
    path = config.stage2.t_max * config.stage2.contrastive_step_size
    distances = _distances(ours["images"], other["images"]) / path
    logits = np.abs(ours["logits"] - other["logits"]).max()
    return {
        "logits": float(logits / np.abs(ours["logits"]).max()),
        "image_median": float(np.median(distances)),
        "rounding": float(np.median(_distances(ours["images"], ours["nearby"])) / path),
        "image_worst": float(distances.max()),
        "loss": _loss_difference(ours["metrics"], other["metrics"]),
        "loss_rounding": _loss_difference(ours["metrics"], ours["nearby_metrics"]),
        **{
            name: _difference(ours[name], other[name], start)
            for name in ("params", "average_params")
        },
    }


def _loss_difference(metrics: list, others: list) -> float:
    """The largest difference between two runs in a loss or a score of a step."""
    return max(
        abs(a[name] - b[name])
        for a, b in zip(metrics, others, strict=True)
        for name in METRICS
    )


def _distances(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Euclidean distance of each image [B, ...] from its counterpart: [B]."""
    difference = (images - others).reshape(len(images), -1).astype(np.float64)
    return np.linalg.norm(difference, axis=1)


def _difference(ours: Any, other: Any, start: Any) -> float:
    """Distance of the two parameter vectors over the distance that ours moved."""
    apart = sum(np.square(a - b).sum() for a, b in _pairs(ours, other))
    moved = sum(np.square(a - b).sum() for a, b in _pairs(ours, start))
    return float(np.sqrt(apart / moved))


def _pairs(tree: Any, other: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Leaves of two nested dicts of the same keys."""
    if tree.keys() != other.keys():
        raise UserError(f"parameters differ: {sorted(tree)} and {sorted(other)}.")
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _pairs(value, other[name])
        else:
            yield value, other[name]


def check(differences: dict[str, float], config: ConfigDict) -> None:
    """Refuses to time two sides that do not compute the same.

    Raises:
      UserError: a difference above its bound.
    """
    dtype = config.model.dtype
    bounds = {
        **BOUNDS[dtype],
        "image_median": _allowed(differences["rounding"], IMAGE_RANGE),
        "loss": _allowed(differences["loss_rounding"], LOSS_RANGES[dtype]),
    }
    for name, bound in bounds.items():
        if not differences[name] <= bound:
            raise UserError(
                f"the two sides disagree: {name} differs by {differences[name]:.2g}, "
                f"allowed is {bound:.2g}; their speed cannot be compared."
            )


def _allowed(rounding: float, limits: tuple[float, float]) -> float:
    least, most = limits
    return min(max(ROUNDING_FACTOR * rounding, least), most)


def describe(differences: dict[str, float]) -> str:
    """One line with all differences."""
    parts = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    return f"differences: {parts}"
