"""How near an image is to the one that it should be."""

import numpy as np

from atebm_jax.metrics import reals


def psnr(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio, -10 log10 of the mean squared error.

    Args:
      images, truth: [N, ...] in [0, 1].

    Returns:
      [N] float64, decibels; infinite where both are the same.
    """
    error = np.square(reals.floats(images) - reals.floats(truth))
    mean = error.reshape(len(error), -1).mean(axis=1)
    with np.errstate(divide="ignore"):
        return -10 * np.log10(mean)
