"""Scores of generated images from their features (method: section 6).

All sums are in float64. `Moments` and `SplitSums` take any number of images in constant
memory. Precision, recall and kernel distance compare all pairs of a limited number.

Features are [N, D] and logits [N, K]. Other shapes, too few images, NaN and infinite
values are a ValueError.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy

from atebm_jax.errors import check_choice
from atebm_jax.metrics import reals

#: Of the Inception Score.
SCORE_PROTOCOLS = ("reference", "torch_fidelity")
_ROWS_AT_ONCE = 1024


class Moments(NamedTuple):
    """Sums of features seen so far."""

    number: int  #: images
    mean: np.ndarray  #: [D] float64
    scatter: np.ndarray  #: [D, D] float64, sum of (x - mean)(x - mean)^T

    @classmethod
    def empty(cls, dimensions: int) -> "Moments":
        """Those of no image."""
        return cls(0, np.zeros(dimensions), np.zeros((dimensions, dimensions)))

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Those of features [N, D]."""
        features = reals.floats(features)
        if not len(features):
            return cls.empty(features.shape[1])
        mean = features.mean(axis=0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> "Moments":
        """Those of both sets together (Chan et al., 1979)."""
        total = self.number + other.number
        if total == 0:
            return self
        gap = other.mean - self.mean
        weight = self.number * other.number / total
        return Moments(
            total,
            self.mean + gap * (other.number / total),
            self.scatter + other.scatter + weight * np.outer(gap, gap),
        )

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [D] and covariance [D, D], normalised by N - 1; N >= 2."""
        if self.number < 2:
            raise ValueError(
                f"there are features of {self.number} images: a mean and a covariance "
                "need at least two."
            )
        return self.mean, self.scatter / (self.number - 1)


def feature_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D] (normalised by N - 1) of features; N >= 2."""
    features = reals.floats(features)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"features have shape {features.shape}: a mean and a covariance need at "
            "least two rows [N, D]."
        )
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """Squared Frechet distance of two Gaussians (Heusel et al., 2017, equation 6).

    ||mean_a - mean_b||^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)). The trace of the
    root is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2). That matrix is
    symmetric and positive semi-definite, so singular covariances need no offset.

    Args:
      mean_a, mean_b: [D] means.
      cov_a, cov_b: [D, D] covariances.

    Returns:
      The distance, >= 0 up to rounding; float64 throughout.
    """
    arrays = [reals.floats(x) for x in (mean_a, cov_a, mean_b, cov_b)]
    mean_a, cov_a, mean_b, cov_b = arrays
    shapes = [array.shape for array in arrays]
    if mean_a.ndim != 1 or shapes != [mean_a.shape, mean_a.shape * 2] * 2:
        raise ValueError(
            f"means and covariances have shapes {shapes}: expected [D], [D, D], [D] "
            "and [D, D]."
        )
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(
            "some means or covariances are NaN or infinite: they have no distance."
        )
    values, vectors = scipy.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = root_a @ cov_b @ root_a
    eigenvalues = scipy.linalg.eigvalsh((product + product.T) / 2)
    trace_root = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    difference = mean_a - mean_b
    return float(
        difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_root
    )


def kernel_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """KID: unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski, 2018).

    Args:
      real, fake: [N, D] and [M, D] features, N, M >= 2.

    Returns:
      The estimate, which may be slightly negative.
    """
    real, fake = _pair(real, fake, smallest=2)

    def total(a: np.ndarray, b: np.ndarray) -> float:
        """Sum of the kernel over all pairs."""
        return sum(((x @ b.T / b.shape[1] + 1) ** 3).sum() for x in _blocks(a))

    means = []
    for x in (real, fake):
        to_itself = ((np.square(x).sum(axis=1) / x.shape[1] + 1) ** 3).sum()
        means.append((total(x, x) - to_itself) / (len(x) * (len(x) - 1)))
    cross = total(real, fake)
    return float(means[0] + means[1] - 2 * cross / (len(real) * len(fake)))


def precision_recall(
    real: np.ndarray, fake: np.ndarray, num_neighbours: int = 3
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., 2019).

    A set's manifold is the union of balls around its points, each reaching to the
    point's k-th nearest other point. Precision: share of fake points in the manifold
    of the real ones. Recall: share of real points in the manifold of the fake ones.

    Args:
      real, fake: [N, D] and [M, D] features, N, M > k.
      num_neighbours: k >= 1.

    Returns:
      (precision, recall), each in [0, 1].
    """
    if num_neighbours < 1:
        raise ValueError(f"num_neighbours is {num_neighbours}: it must be positive.")
    real, fake = _pair(real, fake, smallest=num_neighbours + 1)
    precision = _inside(real, neighbour_radii(real, num_neighbours), fake).mean()
    recall = _inside(fake, neighbour_radii(fake, num_neighbours), real).mean()
    return float(precision), float(recall)


def neighbour_radii(features: np.ndarray, num_neighbours: int) -> np.ndarray:
    """Distance of each point to its k-th nearest other point: [N, D] -> [N]."""
    radii = []
    for block in _blocks(features):
        distances = scipy.spatial.distance.cdist(block, features)
        # The nearest of all is the point itself.
        nearest = np.partition(distances, num_neighbours, axis=1)
        radii.append(nearest[:, num_neighbours])
    return np.concatenate(radii)


def _inside(centres: np.ndarray, radii: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Which points lie in a ball around a centre: [M, D], [M], [N, D] -> [N] bool."""
    found = []
    for block in _blocks(points):
        distances = scipy.spatial.distance.cdist(block, centres)
        found.append((distances <= radii).any(axis=1))
    return np.concatenate(found)


def _blocks(features: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(features), _ROWS_AT_ONCE):
        yield features[start : start + _ROWS_AT_ONCE]


def _pair(
    real: np.ndarray, fake: np.ndarray, smallest: int
) -> tuple[np.ndarray, np.ndarray]:
    arrays = [reals.floats(x) for x in (real, fake)]
    fits = all(a.ndim == 2 and len(a) >= smallest for a in arrays)
    if not fits or arrays[0].shape[1] != arrays[1].shape[1]:
        raise ValueError(
            f"features have shapes {arrays[0].shape} and {arrays[1].shape}: expected "
            f"[N, D] and [M, D] with N, M >= {smallest}."
        )
    if not all(np.isfinite(a).all() for a in arrays):
        raise ValueError("some features are NaN or infinite: they have no distance.")
    return arrays[0], arrays[1]


class SplitSums(NamedTuple):
    """Sums over the images of each split seen so far."""

    counts: np.ndarray  #: [S] images
    probabilities: np.ndarray  #: [S, K] sums of p(y|x)
    entropies: np.ndarray  #: [S] sums of the entropy of p(y|x), nats

    @classmethod
    def empty(cls, num_splits: int, num_classes: int) -> "SplitSums":
        """The sums of no image."""
        shape = (num_splits, num_classes)
        return cls(np.zeros(num_splits), np.zeros(shape), np.zeros(num_splits))

    def add(self, logits: np.ndarray, splits: np.ndarray) -> "SplitSums":
        """The sums with more images: logits [N, K] and the split [N] of each."""
        logits = reals.floats(logits)
        if not np.isfinite(logits).all():
            raise ValueError("some logits are NaN or infinite: they have no score.")
        probabilities = scipy.special.softmax(logits, axis=1)
        entropies = scipy.special.entr(probabilities).sum(axis=1)
        sums = [total.copy() for total in self]
        for total, values in zip(sums, (1.0, probabilities, entropies)):
            np.add.at(total, splits, values)
        return SplitSums(*sums)

    def scores(self) -> np.ndarray:
        """exp(mean_x KL(p(y|x) || p(y))) of every split: [S]."""
        marginal = self.probabilities / self.counts[:, None]
        information = scipy.special.entr(marginal).sum(axis=1)
        return np.exp(information - self.entropies / self.counts)


def split_of_images(number: int, num_splits: int, protocol: str) -> np.ndarray:
    """The split of each of N images in order: [N] int in 0..S-1.

    Args:
      number: N >= 2 * num_splits.
      num_splits: S, how many at most.
      protocol: "reference", chunks of ceil(N / S) images as in torchmetrics, or
        "torch_fidelity", chunks that begin at floor(i N / S); a ValueError otherwise.
    """
    check_choice("protocol", protocol, SCORE_PROTOCOLS)
    number, num_splits = reals.counts(number, num_splits)
    if num_splits < 1 or number < 2 * num_splits:
        raise ValueError(
            f"there are logits of {number} images: {num_splits} splits need [N, K] "
            f"with N >= {2 * num_splits}."
        )
    if protocol == "reference":
        return np.arange(number) // -(-number // num_splits)
    bounds = np.arange(1, num_splits) * number // num_splits
    return np.searchsorted(bounds, np.arange(number), side="right")


def score_spread(scores: np.ndarray, protocol: str) -> float:
    """Standard deviation over splits: with n - 1 in the reference protocol, else n."""
    unbiased = protocol == "reference" and len(scores) > 1
    return float(np.std(reals.floats(scores), ddof=int(unbiased)))


def inception_score(
    logits: np.ndarray, num_splits: int = 10, *, protocol: str = "reference"
) -> tuple[float, float]:
    """Inception Score and its spread over splits of consecutive images.

    Args:
      logits: [N, K] of the Inception network (without its last bias in the reference
        protocol) or of any classifier; N >= 2 * num_splits. Shuffle the images first
        if their order means something, as both protocols do.
      num_splits: how many.
      protocol: as of `split_of_images`.

    Returns:
      (mean, standard deviation) over the splits.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2:
        raise ValueError(f"logits have shape {logits.shape}: expected [N, K].")
    splits = split_of_images(len(logits), num_splits, protocol)
    sums = SplitSums.empty(splits[-1] + 1, logits.shape[1]).add(logits, splits)
    scores = sums.scores()
    return float(np.mean(scores)), score_spread(scores, protocol)
