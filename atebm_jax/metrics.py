"""Pure statistics: no model, no file, no config."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg


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
    """
    ranked = jnp.sort(negative)
    below = jnp.searchsorted(ranked, positive, side="left")
    not_above = jnp.searchsorted(ranked, positive, side="right")
    wins = 0.5 * (below + not_above).astype(positive.dtype)
    area = wins.mean() / negative.shape[0]
    broken = jnp.isnan(positive).any() | jnp.isnan(negative).any()
    return jnp.where(broken, jnp.nan, area)


def feature_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D] (normalised by N - 1) of features [N, D].

    Raises:
      ValueError: fewer than two rows.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"features have shape {features.shape}: a mean and a covariance need at "
            "least two rows [N, D]."
        )
    features = np.asarray(features, np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False).reshape(
        features.shape[1], features.shape[1]
    )


def frechet_distance(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """Squared Frechet distance of two Gaussians (Heusel et al., 2017, equation 6).

    ||mean_a - mean_b||^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)). The trace of the
    root is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), symmetric and
    positive semi-definite, so that singular covariances need no offset.

    Args:
      mean_a, mean_b: [D] means.
      cov_a, cov_b: [D, D] covariances.

    Returns:
      The distance, >= 0 up to rounding; float64 throughout.
    """
    values, vectors = scipy.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = root_a @ cov_b @ root_a
    eigenvalues = scipy.linalg.eigvalsh((product + product.T) / 2)
    trace_root = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    difference = mean_a - mean_b
    return float(
        difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_root
    )
