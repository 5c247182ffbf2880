"""How well a score ranks: accuracy, ROC and precision-recall of two sets of scores.

In-distribution images are the positive ones, and a higher score means more in
distribution.
"""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import average_precision_score
from sklearn.metrics import roc_curve as sklearn_roc_curve


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether the largest logit is the label's: [B, K], [B] -> [B] bool."""
    return logits.argmax(axis=-1) == labels


def auroc(positive: jax.Array, negative: jax.Array) -> jax.Array:
    """Area under the ROC curve: P(positive > negative) + P(equal) / 2.

    Counts by sorting, so that ties are exact and memory stays linear; works under jit.

    Args:
      positive: [P] scores of what should rank higher, P >= 1.
      negative: [N] scores of what should rank lower, N >= 1.

    Returns:
      [] float in [0, 1]; NaN if any score is NaN.

    Raises:
      ValueError: an empty set.
    """
    if not positive.size or not negative.size:
        raise ValueError(
            f"there are {positive.size} positive and {negative.size} negative scores: "
            "an area needs at least one of each."
        )
    ranked = jnp.sort(negative)
    below = jnp.searchsorted(ranked, positive, side="left")
    not_above = jnp.searchsorted(ranked, positive, side="right")
    wins = 0.5 * (below + not_above).astype(positive.dtype)
    # Compiled means multiply by a rounded 1 / P, which can end beyond 1.
    area = jnp.clip(wins.mean() / negative.shape[0], 0.0, 1.0)
    broken = jnp.isnan(positive).any() | jnp.isnan(negative).any()
    return jnp.where(broken, jnp.nan, area)


def average_precision(positive: np.ndarray, negative: np.ndarray) -> float:
    """Area under the precision-recall curve as a sum of steps, without interpolation.

    Args:
      positive: [P] scores of what should rank higher, P >= 1.
      negative: [N] scores of what should rank lower, N >= 1.

    Returns:
      A number in (0, 1]; P / (P + N) where all scores are equal.

    Raises:
      ValueError: an empty set or a NaN.
    """
    scores, truth = _joined(positive, negative)
    return float(average_precision_score(truth, scores))


def roc_curve(
    positive: np.ndarray, negative: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1).

    Arguments and errors as of `average_precision`.

    Returns:
      ([M], [M]) float64, both ascending.
    """
    scores, truth = _joined(positive, negative)
    false_rate, true_rate, _ = sklearn_roc_curve(truth, scores, drop_intermediate=False)
    return false_rate, true_rate


def fpr_at_tpr(
    positive: np.ndarray, negative: np.ndarray, true_positive_rate: float = 0.95
) -> float:
    """Share of negatives accepted by the first threshold that keeps enough positives.

    Every distinct score is a threshold; nothing is interpolated between them. Other
    arguments and errors as of `average_precision`.

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
    positive, negative = np.ravel(positive), np.ravel(negative)
    if not len(positive) or not len(negative):
        raise ValueError(
            f"there are {len(positive)} positive and {len(negative)} negative scores: "
            "a ranking needs at least one of each."
        )
    scores = np.concatenate([positive, negative]).astype(np.float64)
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} scores are NaN: none has a rank.")
    # scikit-learn refuses infinite scores; their ranks say the same.
    ranks = np.unique(scores, return_inverse=True)[1]
    return ranks, np.repeat([1, 0], [len(positive), len(negative)])
