"""Inception Score, in constant memory (Salimans et al., 2016)."""

from typing import NamedTuple

import numpy as np

from atebm_jax.errors import check_choice
from atebm_jax.metrics import reals

PROTOCOLS = ("reference", "torch_fidelity")


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
        """The sums with more images: logits [N, K] and the split [N] of each.

        Raises:
          ValueError: logits that are NaN or infinite.
        """
        import scipy.special  # slow to import

        logits = reals.floats(logits)
        if not np.isfinite(logits).all():
            raise ValueError("some logits are NaN or infinite: they have no score.")
        probabilities = scipy.special.softmax(logits, axis=1)
        entropies = scipy.special.entr(probabilities).sum(axis=1)
        sums = [x.copy() for x in self]
        for total, values in zip(
            sums, (np.ones(len(splits)), probabilities, entropies)
        ):
            np.add.at(total, splits, values)
        return SplitSums(*sums)

    def scores(self) -> np.ndarray:
        """exp(mean_x KL(p(y|x) || p(y))) of every split: [S]."""
        import scipy.special  # slow to import

        marginal = self.probabilities / self.counts[:, None]
        information = scipy.special.entr(marginal).sum(axis=1)
        return np.exp(information - self.entropies / self.counts)


def split_of_images(number: int, num_splits: int, protocol: str) -> np.ndarray:
    """The split of each of N images in order: [N] int in 0..S-1.

    Args:
      number: N >= 2 * num_splits.
      num_splits: S, how many at most.
      protocol: "reference", chunks of ceil(N / S) images as in torchmetrics, or
        "torch_fidelity", chunks that begin at floor(i N / S).

    Raises:
      ValueError: unknown protocol, too few images.
    """
    number, num_splits = int(number), int(num_splits)
    check_choice("protocol", protocol, PROTOCOLS)
    if num_splits < 1 or number < 2 * num_splits:
        raise ValueError(
            f"there are logits of {number} images: {num_splits} splits need [N, K] "
            f"with N >= {2 * num_splits}."
        )
    if protocol == "reference":
        return np.arange(number) // -(-number // num_splits)
    bounds = np.arange(1, num_splits) * number // num_splits
    return np.searchsorted(bounds, np.arange(number), side="right")


def spread(scores: np.ndarray, protocol: str) -> float:
    """Standard deviation over splits: with n - 1 in the reference protocol, else n."""
    unbiased = protocol == "reference" and len(scores) > 1
    return float(np.std(reals.floats(scores), ddof=int(unbiased)))


def inception_score(
    logits: np.ndarray, num_splits: int = 10, *, protocol: str = "reference"
) -> tuple[float, float]:
    """Inception Score and its spread over splits of consecutive images.

    Args:
      logits: [N, K] of the Inception network (without its last bias in the reference
        protocol) or of any classifier; N >= 2 * num_splits. Both protocols shuffle
        images beforehand; do so if their order means something.
      num_splits: how many.
      protocol: as of `split_of_images`.

    Returns:
      (mean, standard deviation) over the splits.

    Raises:
      ValueError: unknown protocol, too few images, logits that are no numbers.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2:
        raise ValueError(f"logits have shape {logits.shape}: expected [N, K].")
    splits = split_of_images(len(logits), num_splits, protocol)
    sums = SplitSums.empty(splits[-1] + 1, logits.shape[1]).add(logits, splits)
    scores = sums.scores()
    return float(np.mean(scores)), spread(scores, protocol)
