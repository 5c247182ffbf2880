"""What a training method declares, and what it becomes for a network."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from atebm_jax import losses, metrics
from atebm_jax.stages.parts import Part, attack

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
    #: may pass in parts and still be ranked as one. `health` watches those it knows:
    #: "loss_ce" and "accuracy_adv" (or "accuracy") of a method that classifies,
    #: "logit_spread", "score_real" and "score_contrastive". Every "loss_NAME" is shown.
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

    #: the batches it takes, of "gen", "cls" (read in any case) and "ood", the seeds
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
    #: whether T contrastive steps lead from the seeds: its block has `t_max`,
    #: `contrastive_step_size` and `auc_threshold`, its metrics "T" and "auc", its
    #: `parts` CONTRASTIVE
    curriculum: bool = False
    #: block -> steps in the window of the AUC
    window: Callable[[ml_collections.ConfigDict], int] = lambda block: 1
    #: block -> what a step does before the gradient of its loss, by the names that
    #: costs are told with
    parts: Callable[[ml_collections.ConfigDict], dict[str, Part]] = lambda block: {
        "adversary step": attack(block.adversary)
    }
    #: block -> passes that the gradient of the loss takes, for one image of each
    #: stream: 3 for each set of images (`evaluate.cost`)
    loss_passes: Callable[[ml_collections.ConfigDict], int] = lambda block: 3

    def t_max(self, block: ml_collections.ConfigDict) -> int:
        """T_max; 0 for a method without a curriculum."""
        return block.t_max if self.curriculum else 0

    def turns(self, block: ml_collections.ConfigDict) -> dict[str, int]:
        """How often each of the `parts` runs in one step, at most."""
        return {name: part.turns for name, part in self.parts(block).items()}


def classified(
    logits: jax.Array, labels: jax.Array, accuracy: str = "accuracy_adv"
) -> dict[str, jax.Array]:
    """Outputs of a loss: the mean cross-entropy (nats), the accuracy, and the logits.

    The accuracy is called "accuracy" where the images are not adversarial.
    """
    return {
        "loss_ce": losses.cross_entropy(logits, labels).mean(),
        accuracy: metrics.accuracy(logits, labels).mean(),
        "logits_adv": logits,
    }


def with_spread(outputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """How far logits differ from image to image, in place of the logits [B, K].

    sqrt(mean_k Var_b f(x_b)[k]): 0 where all images of the batch get the same.
    """
    rest = {k: x for k, x in outputs.items() if k != "logits_adv"}
    variance = outputs["logits_adv"].astype(jnp.float32).var(axis=0)
    return rest | {"logit_spread": jnp.sqrt(variance.mean())}
