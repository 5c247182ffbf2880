"""95 % intervals: of shares and areas, by bootstrap, by a jackknife over groups.

Arguments out of their range are a ValueError.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy

from atebm_jax.metrics import reals

# How many standard errors a normal interval of 95 % reaches to either side.
_REACH = 1.959963984540054


def wilson_interval(hits: int, number: int) -> tuple[float, float]:
    """Interval of a proportion (Wilson, 1927); stays in [0, 1] and is never a point.

    Args:
      hits: successes, 0 <= hits <= number.
      number: trials >= 1.
    """
    hits, number = reals.counts(hits, number)
    if not (number >= 1 and 0 <= hits <= number):
        raise ValueError(
            f"{hits} hits of {number}: expected 0 <= hits <= number and number >= 1."
        )
    result = scipy.stats.binomtest(hits, number).proportion_ci(method="wilson")
    return float(result.low), float(result.high)


def auroc_interval(
    area: float, num_positive: int, num_negative: int
) -> tuple[float, float]:
    """Interval of an area under the ROC curve (Newcombe, 2006, method 5).

    It holds every area from which the measured one is at most 1.96 standard errors
    away. The variance is that of Hanley and McNeil (1982) for groups of the mean size.
    Like Wilson's interval it stays in [0, 1] and is never a point, not even for a
    perfect area.

    Args:
      area: in [0, 1].
      num_positive, num_negative: scores of each kind, >= 1.
    """
    area = float(area)
    num_positive, num_negative = reals.counts(num_positive, num_negative)
    if not (0 <= area <= 1 and min(num_positive, num_negative) >= 1):
        raise ValueError(
            f"area {area} of {num_positive} positive and {num_negative} negative "
            "scores: expected an area in [0, 1] and at least one of each."
        )
    more = (num_positive + num_negative) / 2 - 1

    def excess(candidate: float) -> float:
        """Negative at the area itself, positive at the ends of [0, 1]."""
        shape = (1 - candidate) / (2 - candidate) + candidate / (1 + candidate)
        variance = candidate * (1 - candidate) * (1 + more * shape)
        variance /= num_positive * num_negative
        return (area - candidate) ** 2 - _REACH**2 * variance

    def bound(end: float) -> float:
        """The root between an end of [0, 1] and the area."""
        if area == end:
            return end
        # Start beside the area: the variance of a perfect one is zero.
        beside = area + 1e-9 * (end - area)
        return float(scipy.optimize.brentq(excess, end, beside))

    return bound(0.0), bound(1.0)


def bootstrap_interval(
    statistic: Callable[..., Any],
    arrays: Sequence[np.ndarray],
    *,
    paired: bool,
    num_resamples: int = 1000,
    seed: int = 0,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[Any, Any]:
    """Normal interval with the bootstrap's standard error (Efron, 1979).

    Its middle is the statistic itself: the repeated rows of resamples shift many
    statistics, such as a calibration error or an area with ties.

    Args:
      statistic: called with as many resampled arrays as are given; one number or
        several.
      arrays: [N, ...] each, N >= 1.
      paired: rows of the arrays belong together (logits and labels), so N is the same;
        otherwise each array is resampled by itself (positive and negative scores).
      num_resamples: how many, >= 1.
      seed: of the resampling; the same interval for the same seed.
      bounds: of the statistic; the interval is cut there.
    """
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}: it must be positive.")
    arrays = [np.asarray(array) for array in arrays]
    lengths = [len(array) for array in arrays]
    if not all(lengths) or (paired and len(set(lengths)) > 1):
        raise ValueError(
            f"arrays have {lengths} rows: expected at least one each"
            f"{', and the same number' if paired else ''}."
        )
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(num_resamples):
        if paired:
            rows = [rng.integers(0, lengths[0], lengths[0])] * len(arrays)
        else:
            rows = [rng.integers(0, n, n) for n in lengths]
        chosen = [array[index] for array, index in zip(arrays, rows)]
        values.append(reals.floats(statistic(*chosen)))
    value = reals.floats(statistic(*arrays))
    reach = _REACH * np.std(values, axis=0)
    return np.clip(value - reach, *bounds), np.clip(value + reach, *bounds)


def jackknife_interval(
    value: float, without_group: Sequence[float]
) -> tuple[float, float]:
    """Normal interval from a statistic recomputed without each group (Tukey, 1958).

    variance = (G - 1) / G * sum_g (v_g - mean v)^2, for G groups of equal size.

    Args:
      value: the statistic of everything, the middle of the interval.
      without_group: [G] the statistic of everything but group g, G >= 2.
    """
    values = reals.floats(without_group)
    if len(values) < 2:
        raise ValueError(
            f"there are {len(values)} groups: a jackknife needs two or more."
        )
    reach = float(_REACH * np.sqrt((len(values) - 1) * np.var(values)))
    return float(value) - reach, float(value) + reach
