"""Calibration: do predicted probabilities come true? (method: section 6)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.special

from atebm_jax.metrics import reals


class Reliability(NamedTuple):
    """A reliability diagram: predictions binned by confidence.

    Attributes:
      edges: [M + 1] float64; bin m holds confidences in (edges[m], edges[m + 1]].
      counts: [M] int, predictions in each bin.
      confidence: [M] their mean maximum softmax; NaN in empty bins.
      accuracy: [M] their share of correct ones; NaN in empty bins.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

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
    """All calibration scores of one set of logits.

    Attributes:
      ece: expected calibration error, bins of equal width.
      adaptive_ece: the same with bins of equal count.
      mce: maximum calibration error, bins of equal width.
      brier: mean squared distance of softmax and one-hot label, in [0, 2].
      nll: mean cross-entropy in nats.
    """

    ece: float
    adaptive_ece: float
    mce: float
    brier: float
    nll: float


def calibration(
    logits: np.ndarray, labels: np.ndarray, num_bins: int = 15
) -> Calibration:
    """ECE (Naeini et al., 2015), adaptive ECE (Nguyen and O'Connor, 2015), and more.

    Args:
      logits: [N, K] float, finite, N >= 1.
      labels: [N] int in 0..K-1.
      num_bins: bins of each diagram; always report it with the number.

    Raises:
      ValueError: shapes, labels or values that do not fit.
    """
    equal_width = reliability(logits, labels, num_bins)
    return Calibration(
        ece=equal_width.expected_error,
        adaptive_ece=reliability(
            logits, labels, num_bins, adaptive=True
        ).expected_error,
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
      logits: [N, K] float, finite, N >= 1.
      labels: [N] int in 0..K-1.
      num_bins: how many bins, >= 1.
      adaptive: bins of equal count, bounded by quantiles of the confidences (equal
        confidences stay together, so that there may be fewer), instead of equal width.

    Raises:
      ValueError: shapes, labels or values that do not fit.
    """
    logits, labels = _checked(logits, labels)
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}: it must be at least 1.")
    # Float32 in its own precision, as a classifier in use would see it.
    confidence = scipy.special.softmax(logits, axis=1).max(axis=1)
    correct = logits.argmax(axis=1) == labels
    edges = np.linspace(0, 1, num_bins + 1)
    if adaptive:
        quantiles = np.unique(np.quantile(confidence, edges))
        edges = np.concatenate([[0.0], quantiles[1:-1], [1.0]])
    index = np.clip(np.searchsorted(edges, confidence) - 1, 0, len(edges) - 2)
    counts = np.bincount(index, minlength=len(edges) - 1)
    sums = [
        np.bincount(index, weights=w, minlength=len(edges) - 1)
        for w in (confidence.astype(np.float64), correct)
    ]
    means = [
        np.divide(s, counts, np.full(len(s), np.nan), where=counts > 0) for s in sums
    ]
    return Reliability(edges, counts, *means)


def brier_score(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over images of sum_k (p_k - [k = y])^2 (Brier, 1950), in [0, 2].

    Arguments and errors as of `calibration`.
    """
    logits, labels = _checked(logits, labels)
    difference = scipy.special.softmax(logits.astype(np.float64), axis=1)
    difference[np.arange(len(labels)), labels] -= 1
    return float(np.square(difference).sum(axis=1).mean())


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy in nats. Arguments and errors as of `calibration`."""
    logits, labels = _checked(logits, labels)
    logs = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    return float(-logs[np.arange(len(labels)), labels].mean())


# What temperature scaling may minimise.
CRITERIA: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "nll": negative_log_likelihood,
    "ece": lambda logits, labels: reliability(logits, labels, 20).expected_error,
}


def fit_temperature(
    logits: np.ndarray, labels: np.ndarray, criterion: str = "nll"
) -> float:
    """The T > 0 for which softmax(logits / T) is calibrated best (Guo et al., 2017).

    Fit it on held-out data, not on what the calibration is then reported for.

    Args:
      logits: [N, K] float.
      labels: [N] int.
      criterion: "nll", convex in 1 / T; or "ece" of 20 bins, the lowest of 2,000 values
        of log T from -3 to 1.

    Returns:
      T in [e^-5, e^5] for "nll": the bounds where the data would have it without end,
      as when every prediction is right.

    Raises:
      ValueError: unknown criterion; shapes, labels or values that do not fit.
    """
    logits, labels = _checked(logits, labels)
    if criterion not in CRITERIA:
        raise ValueError(
            f"unknown criterion {criterion!r}: choose one of {', '.join(CRITERIA)}."
        )
    if criterion == "ece":
        temperatures = np.exp(np.linspace(-3, 1, 2000))
        errors = [CRITERIA["ece"](logits / t, labels) for t in temperatures]
        return float(temperatures[np.argmin(errors)])
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

    The likelihood is concave in 1 / T. An image's score is f(x)[y] - E[f(x)[Y]], its
    curvature Var[f(x)[Y]], with Y drawn from softmax(f(x) / T); the error of 1 / T is
    the root mean square of the scores over the mean curvature and the root of N, the
    model not being taken for true.

    Args:
      logits, labels: as of `fit_temperature`.
      temperature: what it returned for them.

    Returns:
      The error, T's own unit; infinite where the data do not fix T.
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
