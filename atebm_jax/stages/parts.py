"""The parts of a step before the gradient of its loss, as its costs are told."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_collections

from atebm_jax import losses

#: The part of a step whose turns are T, for a method with a curriculum.
CONTRASTIVE = "contrastive step"


class Part(NamedTuple):
    """What a step does with images before the gradient of its loss."""

    turns: int  #: how often in one step, at most
    #: (logits [B, K], labels [B]) -> [B], what is read of the images; about as costly
    reads: Callable[[jax.Array, jax.Array], jax.Array]
    #: where the loop is traced that climbs it by image gradients: the names of its
    #: scopes, joined by "/"; "" where it is read alone, without a loop
    scope: str = ""
    keep_best: bool = False  #: whether it is read once more, of the last images


def attack(settings: ml_collections.ConfigDict, scope: str = "adversary/climb") -> Part:
    """The steps of an `attacks.adversary`, whatever its loss: that hardly counts."""
    return Part(
        settings.num_steps, losses.cross_entropy, scope, bool(settings.keep_best)
    )
