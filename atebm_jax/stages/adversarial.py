"""Adversarial training of the classifier: stage 1 (paper, section 4)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import ml_collections

from atebm_jax import attacks, models
from atebm_jax.stages import method
from atebm_jax.stages.method import Batch, Method, Stage, Variables, with_spread

STREAMS = ("cls",)


def build(model: nn.Module, config: ml_collections.ConfigDict) -> Stage:
    """L_AT-CE = E[CE(f(x_adv), y)].

    The attack runs in evaluation mode (running statistics); only the training pass
    uses the batch's statistics and moves the running ones.
    """
    adversary = attacks.adversary(**config.adversary)

    def adversaries(
        key: None, variables: Variables, extra: Any, batch: Batch
    ) -> dict[str, jax.Array]:
        del key, extra
        logits_fn = models.freeze(model, variables, batch["x_cls"].shape[1:])
        return {"x_adv": adversary(logits_fn, batch["x_cls"], batch["y_cls"])}

    def loss(
        params: Any, batch_stats: Any, batch: Batch, made: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        variables = {"params": params, "batch_stats": batch_stats}
        (logits,), batch_stats = models.one_pass(
            model, variables, [made["x_adv"]], frozen=False
        )
        outputs = method.classified(logits, batch["y_cls"])
        return outputs["loss_ce"], (batch_stats, outputs)

    return Stage(STREAMS, adversaries, loss, with_spread)


METHOD = Method(STREAMS, build, whole_batch=lambda block: True)
