"""ROC and precision-recall curves of two sets of scores, on the host.

Scores as of `ranking`; NaN is a ValueError too.
"""

import numpy as np

from atebm_jax.metrics import ranking, reals


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
    ranking.check_not_empty(positive, negative)
    scores = np.concatenate([positive, negative])
    if broken := reals.count_nan(scores):
        raise ValueError(f"{broken} scores are NaN: none has a rank.")
    # scikit-learn refuses infinite scores; their ranks say the same.
    ranks = np.unique(scores, return_inverse=True)[1]
    return ranks, np.repeat([1, 0], [len(positive), len(negative)])
