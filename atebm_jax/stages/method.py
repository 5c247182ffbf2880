"""What a training method declares, and what it becomes for a network."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

Batch = Mapping[str, jax.Array]
Variables = Mapping[str, Any]


class Stage(NamedTuple):
    """A method for one network and one block of the config."""

    streams: tuple[str, ...]  #: as of the `Method`
    #: (key, variables, extra, batch) -> images made by PGD and what is known of them.
    #: Never differentiated. The key is None unless `needs_key`.
    adversaries: Callable[[Any, Variables, Any, Batch], dict[str, jax.Array]]
    #: (params, batch_stats, batch, adversaries) -> (scalar loss, (new batch_stats,
    #: outputs)); differentiable in params. The loss is a mean over the batch; of the
    #: outputs, scalars are means over it and arrays [B, ...] are per image.
    loss: Callable[..., tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]]
    #: outputs of a whole batch -> scalar metrics. Apart from the loss, so that a batch
    #: may pass in parts and still be ranked as one.
    statistics: Callable[[dict[str, jax.Array]], dict[str, jax.Array]] = dict
    #: (key, image_shape) -> the extra state before the first step, a pytree of arrays
    init: Callable[[Any, tuple[int, ...]], Any] = lambda key, image_shape: ()
    #: (extra, outputs of the whole batch and metrics of a step) -> the extra state
    #: after it
    update: Callable[[Any, dict[str, jax.Array]], Any] = lambda extra, metrics: extra
    #: extra -> what the metrics say of it, scalars by name
    shown: Callable[[Any], dict[str, jax.Array]] = lambda extra: {}
    needs_key: bool = False  #: whether `adversaries` draws random numbers
    #: whether the extra state has a row for each image of the batch, and is split over
    #: devices and micro-batches as the batch is
    split_extra: bool = False


class Method(NamedTuple):
    """A training method: one file of this folder, and one line of `stages.STAGES`."""

    #: the batches it takes, of "gen", "cls" and "ood"; "ood" are seeds
    streams: tuple[str, ...]
    #: (model, block of the config) -> Stage; refuses values that it cannot use
    build: Callable[[nn.Module, ml_collections.ConfigDict], Stage]
    #: adds the method's own fields to a block of the config, with defaults
    block: Callable[[ml_collections.ConfigDict], None] = lambda block: None
    #: (name, block) refuses values that no network could be trained with
    check: Callable[[str, ml_collections.ConfigDict], None] = lambda name, block: None
    #: the stage whose averaged weights it starts from; "" for random ones
    starts_from: str = ""
    #: block -> whether normalisation sees the whole batch, so that it cannot pass in
    #: parts
    whole_batch: Callable[[ml_collections.ConfigDict], bool] = lambda block: False
    #: block -> whether the cross-entropy has a weight
    classifies: Callable[[ml_collections.ConfigDict], bool] = lambda block: True
    curriculum: bool = False  #: whether T contrastive steps lead from the seeds
    #: block -> T_max; 0 for a method without a curriculum
    contrastive_steps: Callable[[ml_collections.ConfigDict], int] = lambda block: 0
    #: block -> steps in the window of the AUC
    window: Callable[[ml_collections.ConfigDict], int] = lambda block: 1
    #: (block, T) -> passes of an image through the network in one step, beside those of
    #: the adversary (`evaluate.cost`)
    passes: Callable[[ml_collections.ConfigDict, int], int] = lambda block, steps: 3
    #: block -> how often a step climbs at most, by the parts of `dry_run`
    turns: Callable[[ml_collections.ConfigDict], dict[str, int]] = lambda block: {
        "adversary step": block.adversary.num_steps
    }


def with_spread(outputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """How far logits differ from image to image, in place of the logits [B, K].

    sqrt(mean_k Var_b f(x_b)[k]): 0 where all images of the batch get the same.
    """
    rest = {k: x for k, x in outputs.items() if k != "logits_adv"}
    variance = outputs["logits_adv"].astype(jnp.float32).var(axis=0)
    return rest | {"logit_spread": jnp.sqrt(variance.mean())}
