"""What makes a figure of AutoAttack doubtful: looked for before and after."""

from collections.abc import Mapping

import numpy as np

from atebm_jax.autoattack.programs import Probe

# Logits of two passes that differ by more come from a randomised network.
_SAME = 1e-4


def before(seen: Probe, version: str, stochastic: bool) -> list[str]:
    """Warnings from a probe of the first images, one sentence each."""
    logits, again, flat = seen
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
            f"{int(flat.sum())} of the first {len(flat)} images have a zero gradient "
            "of the cross-entropy: attacks that follow gradients are unreliable there."
        )
    if not np.isfinite(logits).all():
        notes.append("Some logits are not finite: no figure here can be trusted.")
    return notes


def after(robust: Mapping[str, np.ndarray]) -> list[str]:
    """Warnings from the images that are robust after each attack, in their order."""
    names = list(robust)
    if "square" not in names[1:]:
        return []
    # All other attacks follow gradients.
    before = robust[names[names.index("square") - 1]]
    fooled = int(before.sum() - robust["square"].sum())
    warning = (
        f"Square, which uses no gradients, fooled {fooled} images that the attacks "
        "before it did not: if they are many, the network may hide its gradients."
    )
    return [warning] if fooled else []


def _looks_like_softmax(logits: np.ndarray) -> bool:
    inside = (logits >= 0).all() and (logits <= 1).all()
    sums = bool(np.abs(logits.sum(axis=-1) - 1).max() < 1e-3)
    return bool(inside and sums and logits.shape[-1] > 1)
