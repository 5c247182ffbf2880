"""The terms of the training objectives (paper, section 4)."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from atebm_jax import energy


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy -log softmax(f(x))[y], one value an image.

    Args:
      logits: [B, K] float.
      labels: [B] int in 0..K-1.

    Returns:
      [B] losses in nats, not averaged: the caller sums (attacks) or averages (losses).
    """
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    return -energy.at_labels(log_probabilities, labels)


def contrastive_bce(real_scores: jax.Array, contrastive_scores: jax.Array) -> jax.Array:
    """Binary cross-entropy with the score s(x) = -E(x) as its logit (L_BCE).

    Real images have target 1, contrastive images target 0, and the mean runs over
    both sets: with B images each it is half the sum of the two means.

    Args:
      real_scores: [B] s(x) of images from the data.
      contrastive_scores: [B] s(x_T) of images made by PGD.

    Returns:
      Scalar loss in nats.
    """
    losses = jnp.concatenate(
        [-jax.nn.log_sigmoid(real_scores), -jax.nn.log_sigmoid(-contrastive_scores)]
    )
    return losses.mean()


def from_uniform(logits: jax.Array) -> jax.Array:
    """KL(uniform || softmax f(x)), [B, K] -> [B] in nats (Augustin et al., 2020).

    Unlike the largest probability it has a useful gradient everywhere.
    """
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    return -math.log(logits.shape[-1]) - log_probabilities.mean(axis=-1)


def r1(score_fn: Callable[[jax.Array], jax.Array], images: jax.Array) -> jax.Array:
    """R1 penalty 0.5 * mean_i ||d s(x_i) / d x_i||_2^2 (Mescheder et al., 2018).

    Args:
      score_fn: images [B, H, W, C] -> scores [B], each depending on its image alone.
      images: [B, H, W, C] float in [0, 1].

    Returns:
      Scalar penalty; differentiable with respect to what `score_fn` closes over.
    """
    gradients = jax.grad(lambda x: score_fn(x).sum())(images)
    return 0.5 * jnp.square(gradients).sum(axis=(1, 2, 3)).mean()
