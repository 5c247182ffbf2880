"""One classifier, three readings (paper, section 3).

A classifier's logits f(x) in R^K define a joint energy, a marginal energy and the
usual softmax. Only this file makes energies of logits. Others ask for an energy, or for
a score, which is minus an energy.
"""

import jax
import jax.numpy as jnp


def at_labels(values: jax.Array, labels: jax.Array) -> jax.Array:
    """values[i, labels[i]] of [B, K] and [B]; NaN for a label outside of 0..K-1.

    By a mask: the gradient of indexing is a scatter, one more kernel on a GPU.
    """
    chosen = jax.nn.one_hot(labels.ravel().astype(int), values.shape[-1], dtype=bool)
    found = jnp.where(chosen, values, 0).sum(axis=-1)
    return jnp.where(chosen.any(axis=-1), found, jnp.nan)


def joint(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Joint energy E(x, y) = -f(x)[y].

    Args:
      logits: [B, K] float, f(x).
      labels: [B] int in 0..K-1.

    Returns:
      [B] energies, in the dtype of the logits. Lower means more likely.
    """
    return -at_labels(logits, labels)


def marginal(logits: jax.Array) -> jax.Array:
    """Marginal energy E(x) = -logsumexp_y f(x)[y].

    Args:
      logits: [B, K] float, f(x).

    Returns:
      [B] energies, in the dtype of the logits. Lower means more likely.
    """
    return -jax.nn.logsumexp(logits, axis=-1)


def class_probabilities(logits: jax.Array) -> jax.Array:
    """The classifier p(y | x) = softmax f(x): [B, K] logits to [B, K]."""
    return jax.nn.softmax(logits, axis=-1)


def score(logits: jax.Array, labels: jax.Array | None = None) -> jax.Array:
    """Unnormalised log-density: -E(x, y) with labels, -E(x) without.

    This is what `ascent` climbs and what the contrastive loss takes as its logit.

    Args:
      logits: [B, K] float, f(x).
      labels: [B] int in 0..K-1, or None for the marginal.

    Returns:
      [B] scores. Higher means more likely.
    """
    return -marginal(logits) if labels is None else -joint(logits, labels)
