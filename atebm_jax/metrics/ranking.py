"""How well a score ranks: accuracy, ROC and precision-recall of two sets of scores.

Positive scores [P], P >= 1, are those of images in distribution, negative ones [N],
N >= 1, those of others. A higher score means more in distribution. Scores are real
numbers of any dtype; an empty set is a ValueError, and outside `auroc` NaN is too.
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
    _check_not_empty(positive, negative)
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


def average_precision(positive: np.ndarray, negative: np.ndarray) -> float:
    """Area under the precision-recall curve as a sum of steps, without interpolation.

    Returns:
      A number in (0, 1]; P / (P + N) where all scores are equal.
    """
    from sklearn.metrics import average_precision_score  # slow to import

    scores, truth = _joined(positive, negative)
    return float(average_precision_score(truth, scores))


def roc_curve(
    positive: np.ndarray, negative: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1).

    Returns:
      ([M], [M]) float64, both ascending.
    """
    from sklearn.metrics import roc_curve  # slow to import

    scores, truth = _joined(positive, negative)
    return roc_curve(truth, scores, drop_intermediate=False)[:2]


def fpr_at_tpr(
    positive: np.ndarray, negative: np.ndarray, true_positive_rate: float = 0.95
) -> float:
    """Share of negatives accepted by the first threshold that keeps enough positives.

    Every distinct score is a threshold; nothing is interpolated between them.

    Args:
      positive, negative: scores.
      true_positive_rate: share of positives to be kept, in (0, 1].
    """
    if not 0 < true_positive_rate <= 1:
        raise ValueError(
            f"true_positive_rate is {true_positive_rate}: it must lie in (0, 1]."
        )
    false_rate, true_rate = roc_curve(positive, negative)
    return float(false_rate[np.argmax(true_rate >= true_positive_rate)])


def _joined(
    positive: np.ndarray, negative: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of all scores, and 1 for the positive ones and 0 for the negative."""
    positive, negative = reals.comparable(positive, negative)
    _check_not_empty(positive, negative)
    scores = np.concatenate([positive, negative])
    if broken := reals.count_nan(scores):
        raise ValueError(f"{broken} scores are NaN: none has a rank.")
    # scikit-learn refuses infinite scores; their ranks say the same.
    ranks = np.unique(scores, return_inverse=True)[1]
    return ranks, np.repeat([1, 0], [len(positive), len(negative)])


def _check_not_empty(positive: Any, negative: Any) -> None:
    numbers = np.size(positive), np.size(negative)
    if not all(numbers):
        raise ValueError(
            f"there are {numbers[0]} positive and {numbers[1]} negative scores: a "
            "ranking needs at least one of each."
        )
