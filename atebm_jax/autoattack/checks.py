"""What makes a figure of AutoAttack doubtful: looked for before and after."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atebm_jax import losses
from atebm_jax.autoattack.apgd import ModelFn
from atebm_jax.autoattack.units import Batch

_GRADIENT_ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t")
# Logits of two passes that differ by more come from a randomised network.
_SAME = 1e-4


class Probe(NamedTuple):
    """Two passes and a gradient at some images.

    Attributes:
      logits, again: [B, K] of two passes, with different keys.
      flat: [B] bool, the gradient of the cross-entropy is zero in every pixel.
    """

    logits: jax.Array
    again: jax.Array
    flat: jax.Array


def probe(model: ModelFn) -> Callable[[Batch], Probe]:
    """The function that takes a probe, to be compiled."""

    def take(batch: Batch) -> Probe:
        keys = jax.random.split(jax.random.fold_in(batch.key, 1002))

        def loss(x: jax.Array) -> jax.Array:
            return losses.cross_entropy(model(x, keys[0]), batch.labels).sum()

        gradient = jax.grad(loss)(batch.images)
        return Probe(
            model(batch.images, keys[0]),
            model(batch.images, keys[1]),
            jnp.all(gradient == 0, axis=(1, 2, 3)),
        )

    return take


def before(seen: Probe, size: int, version: str, stochastic: bool) -> list[str]:
    """Warnings from a probe of the first `size` images, one sentence each."""
    logits, again, flat = (np.asarray(x)[:size] for x in seen)
    if not size:
        return []
    notes = []
    differs = bool(np.abs(logits - again).max() > _SAME)
    if differs and version != "rand":
        notes.append(
            "The network is randomised: two passes over the same images differ. Use "
            "version 'rand', which averages gradients over its randomness."
        )
    if version == "rand" and not (differs and stochastic):
        notes.append(
            "Version 'rand' is for randomised networks, and this one is not: use "
            "'standard', which is stronger."
        )
    if _looks_like_softmax(logits):
        notes.append(
            "The outputs look like probabilities, not logits: the softmax saturates "
            "and hides gradients. Attack the logits before it."
        )
    if flat.any():
        notes.append(
            f"{int(flat.sum())} of the first {size} images have a zero gradient of the "
            "cross-entropy: attacks that follow gradients are unreliable there."
        )
    if not np.isfinite(logits).all():
        notes.append("Some logits are not finite: no figure here can be trusted.")
    return notes


def after(robust: Mapping[str, np.ndarray]) -> list[str]:
    """Warnings from the images that are robust after each attack, in their order."""
    names = list(robust)
    if "square" not in names or not names.index("square"):
        return []
    place = names.index("square")
    earlier = set(names[:place])
    fooled = int(robust[names[place - 1]].sum() - robust["square"].sum())
    if not fooled or not earlier & set(_GRADIENT_ATTACKS):
        return []
    return [
        f"Square, which uses no gradients, fooled {fooled} images that the attacks "
        "before it did not: if they are many, the network may hide its gradients."
    ]


def _looks_like_softmax(logits: np.ndarray) -> bool:
    inside = (logits >= 0).all() and (logits <= 1).all()
    sums = bool(np.abs(logits.sum(axis=-1) - 1).max() < 1e-3)
    return bool(inside and sums and logits.shape[-1] > 1)
