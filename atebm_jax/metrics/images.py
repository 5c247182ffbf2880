"""How near an image is to its original, and one set of images to another.

Images of two shapes are a ValueError: they would be broadcast.
"""

import numpy as np

from atebm_jax.metrics import reals

# Numbers of an image chunk that is transformed at once: some 100 MB of work space.
_CHUNK_SIZE = 2**21


def psnr(images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio, -10 log10 of the mean squared error.

    Args:
      images, truth: [N, ...] in [0, 1].

    Returns:
      [N] float64, decibels; infinite where both are the same.
    """
    _check_same("images", np.shape(images), np.shape(truth))
    error = np.square(reals.floats(images) - reals.floats(truth))
    mean = error.reshape(len(error), -1).mean(axis=1)
    with np.errstate(divide="ignore"):
        return -10 * np.log10(mean)


def spectral_distance(first: np.ndarray, second: np.ndarray) -> float:
    """A lower bound on the L2 distance between two sets of images, by their spectra.

    Cut images into orthogonal parts, here rings of equal frequency in each channel. For
    any pairing of images x with images y, Minkowski's inequality gives

        sqrt(E |x - y|^2) >= sqrt(sum_g (a_g(x) - a_g(y))^2),

    where a_g is the root mean square length of part g over a set. Uniform noise has too
    much in the high frequencies, a grey image too little in all but the lowest. The
    bound needs no density. The square by which two samples of one set would differ is
    subtracted, so that few images do not look far apart.

    Args:
      first: [N, H, W, C] in [0, 1].
      second: [M, H, W, C] in [0, 1].

    Returns:
      L2 pixels, at least 0.
    """
    _check_same("the images of a set", np.shape(first)[1:], np.shape(second)[1:])
    (one, variance), (other, other_variance) = _lengths(first), _lengths(second)
    by_chance = (variance + other_variance).sum()
    square = np.square(one - other).sum() - by_chance
    return float(np.sqrt(max(square, 0.0)))


def _check_same(what: str, one: tuple[int, ...], other: tuple[int, ...]) -> None:
    if one != other:
        raise ValueError(f"{what} have shapes {one} and {other}: expected the same.")


def _lengths(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Root mean square lengths [R, C] of the rings, and their variances [R, C]."""
    _, height, width, _ = images.shape
    ring, weight = _rings(height, width)
    order = np.argsort(ring, axis=None)
    starts = np.unique(ring.ravel()[order], return_index=True)[1]
    per_chunk = max(_CHUNK_SIZE // images[0].size, 1)
    energies = []
    for start in range(0, len(images), per_chunk):
        chunk = images[start : start + per_chunk]
        if chunk.dtype != np.float32:
            chunk = reals.floats(chunk)
        spectrum = np.fft.rfft2(chunk, axes=(1, 2), norm="ortho")
        energy = np.square(np.abs(spectrum)) * weight[..., None]
        flat = energy.reshape(len(chunk), ring.size, -1)[:, order]
        energies.append(np.add.reduceat(flat, starts, axis=1))
    # [N, R, C], squared lengths.
    energy = np.concatenate(energies).astype(np.float64)
    mean = energy.mean(axis=0)
    # The root's variance to first order; zero for an empty ring or a single image.
    scale = 4 * max(len(energy) - 1, 1) * np.where(mean > 0, mean, 1)
    return np.sqrt(mean), energy.var(axis=0) / scale


def _rings(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Ring of each coefficient of `rfft2`, and how often it stands in the whole."""
    down = np.fft.fftfreq(height)[:, None]
    across = np.fft.rfftfreq(width)[None, :]
    ring = np.rint(np.hypot(down, across) * max(height, width)).astype(int)
    # Each column stands for two, except the first and the last of an even width.
    alone = (across == 0) | (across == 0.5)
    return ring, np.broadcast_to(np.where(alone, 1.0, 2.0), ring.shape)
