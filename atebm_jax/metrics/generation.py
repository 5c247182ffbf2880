"""Scores of generated images from their features (method: section 6).

All sums run in float64. A running sum (`Moments`) takes any number of images in
constant memory. Precision and recall compare every pair, for samples of limited size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from atebm_jax.metrics import reals

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
        """Mean [D] and covariance [D, D], normalised by N - 1.

        Raises:
          ValueError: fewer than two images.
        """
        if self.number < 2:
            raise ValueError(
                f"there are features of {self.number} images: a mean and a covariance "
                "need at least two."
            )
        return self.mean, self.scatter / (self.number - 1)


def feature_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D] (normalised by N - 1) of features [N, D].

    Raises:
      ValueError: fewer than two rows.
    """
    features = reals.floats(features)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"features have shape {features.shape}: a mean and a covariance need at "
            "least two rows [N, D]."
        )
    return features.mean(axis=0), np.cov(features, rowvar=False).reshape(
        features.shape[1], features.shape[1]
    )


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

    Raises:
      ValueError: shapes that do not fit, NaN or infinite values.
    """
    import scipy.linalg  # slow to import

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
      The estimate; it may be slightly negative.

    Raises:
      ValueError: features that do not fit.
    """
    real, fake = _pair(real, fake, smallest=2)
    means = []
    for features in (real, fake):
        total = sum(_kernel(b, features).sum() for b in _blocks(features))
        diagonal = (
            (np.square(features).sum(axis=1) / features.shape[1] + 1) ** 3
        ).sum()
        means.append((total - diagonal) / (len(features) * (len(features) - 1)))
    cross = sum(_kernel(block, fake).sum() for block in _blocks(real))
    return float(means[0] + means[1] - 2 * cross / (len(real) * len(fake)))


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


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

    Raises:
      ValueError: features that do not fit.
    """
    if num_neighbours < 1:
        raise ValueError(f"num_neighbours is {num_neighbours}: it must be positive.")
    real, fake = _pair(real, fake, smallest=num_neighbours + 1)
    precision = _inside(real, neighbour_radii(real, num_neighbours), fake).mean()
    recall = _inside(fake, neighbour_radii(fake, num_neighbours), real).mean()
    return float(precision), float(recall)


def neighbour_radii(features: np.ndarray, num_neighbours: int) -> np.ndarray:
    """Distance of each point to its k-th nearest other point: [N, D] -> [N]."""

    from scipy.spatial.distance import cdist  # slow to import

    def radii(block: np.ndarray) -> np.ndarray:
        # The nearest of all is the point itself.
        nearest = np.partition(cdist(block, features), num_neighbours, axis=1)
        return nearest[:, num_neighbours]

    return np.concatenate([radii(block) for block in _blocks(features)])


def _inside(centres: np.ndarray, radii: np.ndarray, points: np.ndarray) -> np.ndarray:
    from scipy.spatial.distance import cdist  # slow to import

    found = [(cdist(b, centres) <= radii[None]).any(axis=1) for b in _blocks(points)]
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
