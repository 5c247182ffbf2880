"""What APGD ascends: cross-entropy, DLR, and their stand-ins for few classes.

The DLR loss (Croce and Hein, 2020) is a margin divided by a difference of sorted
logits, so that it changes neither by a shift nor by a scaling of the logits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from atebm_jax import losses

Untargeted = Callable[[jax.Array, jax.Array], jax.Array]
Targeted = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# Keeps the quotient finite where all logits are equal.
_OFFSET = 1e-12


def pick(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The logit of a class: [B, K], [B] int -> [B]."""
    # A masked sum: its gradient is a product, where that of an index is a scatter.
    hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return (logits * hot).sum(axis=-1)


def best_other(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The largest logit among the other classes: [B, K], [B] int -> [B].

    With a single class there is none, and the result is -inf.
    """
    hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.bool_)
    return jnp.where(hot, -jnp.inf, logits).max(axis=-1)


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """max_{k != y} f(x)[k] - f(x)[y], positive where the image is misclassified.

    Args:
      logits: [B, K] float.
      labels: [B] int in 0..K-1.

    Returns:
      [B] margins.
    """
    return best_other(logits, labels) - pick(logits, labels)


def targeted_margin(
    logits: jax.Array, labels: jax.Array, targets: jax.Array
) -> jax.Array:
    """f(x)[t] - f(x)[y], one value an image; arguments as of `dlr_targeted`."""
    return pick(logits, targets) - pick(logits, labels)


def dlr(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Difference of logits ratio (Croce and Hein, 2020, section 4).

    With z sorted in descending order, -(f[y] - max_{k != y} f[k]) / (z_1 - z_3).

    Args:
      logits: [B, K] float, K >= 3.
      labels: [B] int in 0..K-1.

    Returns:
      [B] losses, in [-1, 0] where the image is classified correctly, positive where
      it is not.
    """
    first, second, third = _largest(logits, 3)
    wrong = logits.argmax(axis=-1) != labels
    rival = jnp.where(wrong, first, second)
    return (rival - pick(logits, labels)) / (first - third + _OFFSET)


def dlr_targeted(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """Targeted DLR, (f[t] - f[y]) / (z_1 - (z_3 + z_4) / 2) (ibid.).

    Args:
      logits: [B, K] float, K >= 4.
      labels: [B] int in 0..K-1, the classes to leave.
      targets: [B] int in 0..K-1, the classes to reach.

    Returns:
      [B] losses.
    """
    first, _, third, fourth = _largest(logits, 4)
    scale = first - 0.5 * (third + fourth) + _OFFSET
    return targeted_margin(logits, labels, targets) / scale


UNTARGETED: dict[str, Untargeted] = {
    "ce": losses.cross_entropy,
    "dlr": dlr,
    "margin": margin,
}

TARGETED: dict[str, Targeted] = {
    "dlr": dlr_targeted,
    "margin": targeted_margin,
}


def defined(name: str, num_classes: int, targeted: bool) -> str:
    """The objective to use in place of `name` with so many classes.

    DLR needs 3 classes and targeted DLR 4. Below that the plain margin stands in for
    them: dividing by a positive number changes neither direction nor sign, and APGD
    looks at a loss's order and its gradient's direction only, so that nothing of DLR
    is lost that these few logits could define.
    """
    needed = 4 if targeted else 3
    return "margin" if name == "dlr" and num_classes < needed else name


def _largest(logits: jax.Array, count: int) -> list[jax.Array]:
    """The largest logits in descending order, [B] each."""
    # Not `top_k`, for which devices would send each other their parts of the batch.
    values, rest = [], logits
    for _ in range(count):
        largest = rest.argmax(axis=-1)
        values.append(pick(logits, largest))
        taken = jax.nn.one_hot(largest, logits.shape[-1], dtype=jnp.bool_)
        rest = jnp.where(taken, -jnp.inf, rest)
    return values
