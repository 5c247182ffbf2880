"""How well a score ranks: accuracy, and the area under the ROC curve.

Positive scores [P], P >= 1, are those of images in distribution, negative ones [N],
N >= 1, those of others. A higher score means more in distribution. Scores are real
numbers of any dtype; an empty set is a ValueError.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atebm_jax.metrics import reals


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether the largest logit is the label's: [B, K], [B] -> [B] bool.

    Raises:
      ValueError: other shapes, such as labels [B, 1], which would be broadcast.
    """
    if not np.ndim(logits) or np.shape(labels) != np.shape(logits)[:-1]:
        raise ValueError(
            f"logits have shape {np.shape(logits)} and labels {np.shape(labels)}: "
            "expected [B, K] and [B]."
        )
    if reals.on_host(logits, labels):
        hits = reals.real(logits).argmax(axis=-1) == reals.real(labels)
        return hits  # type: ignore[return-value]
    best, wanted = jnp.asarray(logits).argmax(axis=-1), jnp.asarray(labels)
    if jnp.issubdtype(wanted.dtype, jnp.integer):
        wanted = wanted.astype(best.dtype)
    best, wanted = reals.traced(best, wanted)
    return best == wanted


def auroc(positive: Any, negative: Any) -> Any:
    """Area under the ROC curve: P(positive > negative) + P(equal) / 2.

    It sorts and counts: ties are exact, and memory is linear. Works under jit.

    Returns:
      [] in [0, 1]; NaN if any score is NaN. Under jit in the scores' dtype, at least
      float32; otherwise float64, and scores are compared without rounding.
    """
    check_not_empty(positive, negative)
    if reals.on_host(positive, negative):
        return _auroc(*reals.comparable(positive, negative))
    positive, negative = reals.traced(jnp.asarray(positive), jnp.asarray(negative))
    ranked = jnp.sort(negative)
    below = jnp.searchsorted(ranked, positive, side="left")
    not_above = jnp.searchsorted(ranked, positive, side="right")
    # Counts in the scores' own half precision would end at 65,504, in uint8 at 255.
    counted = reals.promoted(positive.dtype, np.float32)
    wins = 0.5 * (below + not_above).astype(counted)
    # Compiled means multiply by a rounded 1 / P, which can end beyond 1.
    area = jnp.clip(wins.mean() / negative.shape[0], 0.0, 1.0)
    broken = jnp.isnan(positive).any() | jnp.isnan(negative).any()
    return jnp.where(broken, jnp.nan, area)


def _auroc(positive: np.ndarray, negative: np.ndarray) -> np.float64:
    """`auroc` of arrays on the host."""
    if reals.count_nan(positive) or reals.count_nan(negative):
        return np.float64(np.nan)
    ranked = np.sort(negative)
    wins = sum(
        int(np.searchsorted(ranked, positive, side).sum()) for side in ("left", "right")
    )
    return np.float64(wins / (2 * len(positive) * len(negative)))


def check_not_empty(positive: Any, negative: Any) -> None:
    """Refuses scores that nothing can be ranked with: a ValueError."""
    numbers = np.size(positive), np.size(negative)
    if not all(numbers):
        raise ValueError(
            f"there are {numbers[0]} positive and {numbers[1]} negative scores: a "
            "ranking needs at least one of each."
        )
