"""Whether two sides compute the same: images, losses and parameters.

A ReLU network is piecewise linear. Rounding may put one unit on the other side of zero,
from where that image's path goes its own way, so that a few images of a batch differ
visibly between any two correct implementations while most agree to rounding. Hence the
median image is held to a tight bound, the worst only to the length of a few steps.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from atebm_jax.errors import UserError

# Measured on WRN-10-1, 16-2 and 16-4, T 2 to 10, times at least five. Image distances
# are shares of the path T * step, the rest is absolute, parameters relative to how far
# the furthest one moved.
BOUNDS = {
    "float32": {
        "image_median": 1e-3,
        "image_worst": 0.5,
        "loss": 0.02,
        "params": 0.2,
        "average_params": 0.2,
    },
    "bfloat16": {
        "image_median": 0.5,
        "image_worst": 1.5,
        "loss": 0.1,
        "params": 0.5,
        "average_params": 0.5,
    },
}
METRICS = ("loss", "loss_ce", "loss_bce", "score_real", "score_contrastive")


def compare(
    ours: dict, other: dict, start: Any, config: ConfigDict
) -> dict[str, float]:
    """Differences between the results of two sides, keys as in `BOUNDS`.

    Args:
      ours, other: results of `check` of the two sides.
      start: parameters that both started from.
      config: the whole config.
    """
    path = config.stage2.t_max * config.stage2.contrastive_step_size
    difference = (ours["images"] - other["images"]).reshape(len(ours["images"]), -1)
    distances = np.linalg.norm(difference.astype(np.float64), axis=1) / path
    losses = [
        abs(a[name] - b[name])
        for a, b in zip(ours["metrics"], other["metrics"], strict=True)
        for name in METRICS
    ]
    return {
        "image_median": float(np.median(distances)),
        "image_worst": float(distances.max()),
        "loss": max(losses),
        **{
            name: _difference(ours[name], other[name], start)
            for name in ("params", "average_params")
        },
    }


def _difference(ours: Any, other: Any, start: Any) -> float:
    """Largest difference of a parameter over the largest movement of any."""
    moved = max(np.abs(a - c).max() for a, c in _pairs(ours, start))
    return float(max(np.abs(a - b).max() for a, b in _pairs(ours, other)) / moved)


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
    for name, bound in BOUNDS[config.model.dtype].items():
        if not differences[name] <= bound:
            raise UserError(
                f"the two sides disagree: {name} differs by {differences[name]:.2g}, "
                f"allowed is {bound}; their speed cannot be compared."
            )


def describe(differences: dict[str, float]) -> str:
    """One line with all differences."""
    parts = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    return f"differences: {parts}"
