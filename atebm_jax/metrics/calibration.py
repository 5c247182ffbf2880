"""Calibration: do predicted probabilities come true? (method: section 6).

All but `risk_coverage` take logits [N, K] float, finite, N >= 1, and labels [N] int in
0..K-1.
All raise a ValueError for anything else.
"""

from typing import NamedTuple

import numpy as np
import scipy

from atebm_jax.metrics import reals


class Reliability(NamedTuple):
    """A reliability diagram: predictions binned by confidence."""

    edges: np.ndarray  #: [M + 1] float64; confidences in (edges[m], edges[m + 1]]
    counts: np.ndarray  #: [M] int, predictions in each bin
    confidence: np.ndarray  #: [M] their mean maximum softmax; NaN in empty bins
    accuracy: np.ndarray  #: [M] their share of correct ones; NaN in empty bins

    @property
    def expected_error(self) -> float:
        """ECE: mean gap of confidence and accuracy, weighted by the bins' counts."""
        gaps = np.nan_to_num(np.abs(self.confidence - self.accuracy))
        return float((gaps * self.counts).sum() / self.counts.sum())

    @property
    def maximum_error(self) -> float:
        """MCE: the largest gap of a bin that is not empty."""
        return float(np.nanmax(np.abs(self.confidence - self.accuracy)))


class Calibration(NamedTuple):
    """All calibration scores of one set of logits."""

    ece: float  #: expected calibration error, bins of equal width
    adaptive_ece: float  #: the same with bins of equal count
    mce: float  #: maximum calibration error, bins of equal width
    brier: float  #: mean squared distance of softmax and one-hot label, in [0, 2]
    nll: float  #: mean cross-entropy in nats


def calibration(
    logits: np.ndarray, labels: np.ndarray, num_bins: int = 15
) -> Calibration:
    """ECE (Naeini et al., 2015), adaptive ECE (Nguyen and O'Connor, 2015), and more.

    The bins are those of each diagram: report their number with the figures.
    """
    equal_width = reliability(logits, labels, num_bins)
    equal_count = reliability(logits, labels, num_bins, adaptive=True)
    return Calibration(
        ece=equal_width.expected_error,
        adaptive_ece=equal_count.expected_error,
        mce=equal_width.maximum_error,
        brier=brier_score(logits, labels),
        nll=negative_log_likelihood(logits, labels),
    )


def reliability(
    logits: np.ndarray,
    labels: np.ndarray,
    num_bins: int = 15,
    *,
    adaptive: bool = False,
) -> Reliability:
    """Bins predictions by their maximum softmax.

    Args:
      logits, labels: as above.
      num_bins: how many bins, >= 1.
      adaptive: bins of equal count instead of equal width. Quantiles of the confidences
        bound them. Equal confidences stay together, so there may be fewer bins.
    """
    logits, labels = _checked(logits, labels)
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}: it must be at least 1.")
    # Float32 logits keep float32 confidences, as those of a classifier in use.
    confidence = scipy.special.softmax(logits, axis=1).max(axis=1)
    correct = logits.argmax(axis=1) == labels
    edges = np.linspace(0, 1, num_bins + 1)
    if adaptive:
        quantiles = np.unique(np.quantile(confidence, edges))
        edges = np.concatenate([[0.0], quantiles[1:-1], [1.0]])
    index = np.clip(np.searchsorted(edges, confidence) - 1, 0, len(edges) - 2)
    values = np.ones(len(labels)), confidence.astype(np.float64), correct
    counts, *sums = (np.bincount(index, x, len(edges) - 1) for x in values)
    with np.errstate(invalid="ignore"):  # empty bins
        return Reliability(edges, counts.astype(int), *(x / counts for x in sums))


def brier_score(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over images of sum_k (p_k - [k = y])^2 (Brier, 1950), in [0, 2]."""
    logits, labels = _checked(logits, labels)
    difference = scipy.special.softmax(logits.astype(np.float64), axis=1)
    difference[np.arange(len(labels)), labels] -= 1
    return float(np.square(difference).sum(axis=1).mean())


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy in nats."""
    logits, labels = _checked(logits, labels)
    logs = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    return float(-logs[np.arange(len(labels)), labels].mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T > 0 for which softmax(logits / T) is likeliest (Guo et al., 2017).

    The negative log-likelihood is convex in 1 / T. Fit it on held-out data, not on
    what the calibration is then reported for.

    Returns:
      T in [e^-5, e^5]. It is one of these bounds if the likelihood has no maximum, as
      when every prediction is right.
    """
    logits, labels = _checked(logits, labels)
    result = scipy.optimize.minimize_scalar(
        lambda log_t: negative_log_likelihood(logits / np.exp(log_t), labels),
        bounds=(-5, 5),
        method="bounded",
        options={"xatol": 1e-8},
    )
    return float(np.exp(result.x))


def temperature_error(
    logits: np.ndarray, labels: np.ndarray, temperature: float
) -> float:
    """Standard error of a temperature fitted by likelihood (White, 1982).

    With Y drawn from softmax(f(x) / T), an image's score is f(x)[y] - E[f(x)[Y]] and
    its curvature Var[f(x)[Y]]. The error of 1 / T is the root mean square of the
    scores, over the mean curvature and the root of N. It does not assume that the model
    is true.

    Args:
      logits, labels: as above.
      temperature: what `fit_temperature` returned for them.

    Returns:
      The error in the unit of T; infinite where the data do not determine T.
    """
    logits, labels = _checked(logits, labels)
    logits, temperature = logits.astype(np.float64), float(temperature)
    share = scipy.special.softmax(logits / temperature, axis=1)
    mean = (share * logits).sum(axis=1)
    curvature = (share * np.square(logits - mean[:, None])).sum(axis=1).mean()
    scores = logits[np.arange(len(labels)), labels] - mean
    if curvature < 1e-12:
        return float("inf")
    error = np.sqrt(np.square(scores).mean() / len(labels)) / curvature
    return float(error * temperature**2)


def _checked(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits), reals.whole(labels, "labels")
    if logits.dtype != np.float32:
        logits = reals.floats(logits)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not logits.size:
        raise ValueError(
            f"logits have shape {logits.shape} and labels {labels.shape}: expected "
            "[N, K] and [N] with N, K >= 1."
        )
    if not np.isfinite(logits).all():
        raise ValueError("some logits are NaN or infinite: they have no calibration.")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}: expected 0 to "
            f"{logits.shape[1] - 1}."
        )
    return logits, labels


def risk_coverage(
    confidence: np.ndarray, hits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Error among the most confident images, as more and more of them are answered.

    Geifman and El-Yaniv (2017). Images of equal confidence share their errors, so that
    their order does not matter. The mean risk is the area under the curve.

    Args:
      confidence: [N], higher where the answer is more certain.
      hits: [N] bool, whether the answer is right.

    Returns:
      (coverage [N], k / N for k = 1 to N; risk [N] of the k most confident images).
    """
    if not np.size(confidence) or np.shape(confidence) != np.shape(hits):
        raise ValueError(
            f"confidences have shape {np.shape(confidence)} and hits {np.shape(hits)}: "
            "expected [N] of both, N >= 1."
        )
    if broken := reals.count_nan(confidence):
        raise ValueError(f"{broken} confidences are NaN: none has a rank.")
    rank = np.unique(reals.real(confidence), return_inverse=True)[1]
    group = rank.max() - rank
    shared = np.bincount(group, 1.0 - reals.floats(hits)) / np.bincount(group)
    answered = np.arange(1, len(group) + 1)
    return answered / len(group), shared[np.sort(group)].cumsum() / answered
