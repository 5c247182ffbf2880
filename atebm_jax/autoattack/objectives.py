"""What APGD ascends: cross-entropy, DLR, and the plain margin for few classes.

The DLR loss (Croce and Hein, 2020) is a margin divided by a difference of sorted
logits, so that it changes neither by a shift nor by a scaling of the logits.

Everywhere, logits are [B, K] float; labels and targets are [B] int in 0..K-1, the
classes to leave and to reach; results are [B].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from atebm_jax import energy, losses

# Keeps the quotient finite where all logits are equal.
_OFFSET = 1e-12


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """max_{k != y} f(x)[k] - f(x)[y], positive where the image is misclassified.

    With a single class there is no other, and the result is -inf.
    """
    hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.bool_)
    others = jnp.where(hot, -jnp.inf, logits).max(axis=-1)
    return others - energy.at_labels(logits, labels)


def targeted_margin(
    logits: jax.Array, labels: jax.Array, targets: jax.Array
) -> jax.Array:
    """f(x)[t] - f(x)[y]."""
    return energy.at_labels(logits, targets) - energy.at_labels(logits, labels)


def dlr(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Difference of logits ratio (Croce and Hein, 2020, section 4), K >= 3.

    With z sorted in descending order, -(f[y] - max_{k != y} f[k]) / (z_1 - z_3). It
    lies in [-1, 0] where the image is classified correctly and is positive elsewhere.
    """
    first, second, third = _largest(logits, 3)
    wrong = logits.argmax(axis=-1) != labels
    rival = jnp.where(wrong, first, second)
    return (rival - energy.at_labels(logits, labels)) / (first - third + _OFFSET)


def dlr_targeted(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """Targeted DLR, (f[t] - f[y]) / (z_1 - (z_3 + z_4) / 2) (ibid.), K >= 4."""
    first, _, third, fourth = _largest(logits, 4)
    scale = first - 0.5 * (third + fourth) + _OFFSET
    return targeted_margin(logits, labels, targets) / scale


UNTARGETED: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "ce": losses.cross_entropy,
    "dlr": dlr,
    "margin": margin,
}

TARGETED: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "dlr": dlr_targeted,
    "margin": targeted_margin,
}


def loss(
    name: str, logits: jax.Array, labels: jax.Array, targets: jax.Array | None
) -> jax.Array:
    """The objective of a name, or its stand-in for few classes.

    Args:
      name: a key of `UNTARGETED`, or of `TARGETED` if there are targets.
      logits, labels: as everywhere.
      targets: as everywhere, or None.
    """
    name = defined(name, logits.shape[-1], targets is not None)
    if targets is None:
        return UNTARGETED[name](logits, labels)
    return TARGETED[name](logits, labels, targets)


def defined(name: str, num_classes: int, targeted: bool) -> str:
    """The objective to use in place of `name` with so many classes.

    DLR needs 3 classes and targeted DLR 4. Below that the plain margin stands in. It
    is DLR times a positive number, which changes neither direction nor sign, and APGD
    looks only at a loss's order and its gradient's direction.
    """
    needed = 4 if targeted else 3
    return "margin" if name == "dlr" and num_classes < needed else name


def _largest(logits: jax.Array, count: int) -> list[jax.Array]:
    """The largest logits in descending order, [B] each."""
    # Not `top_k`, for which devices would send each other their parts of the batch.
    values, rest = [], logits
    for _ in range(count):
        largest = rest.argmax(axis=-1)
        values.append(energy.at_labels(logits, largest))
        taken = jax.nn.one_hot(largest, logits.shape[-1], dtype=jnp.bool_)
        rest = jnp.where(taken, -jnp.inf, rest)
    return values
