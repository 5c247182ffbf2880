"""RATIO: adversarial training inside and outside the distribution.

Augustin et al., ECCV 2020 (arXiv 2003.09461): what the paper compares with, on the
network, data and evaluation of the config.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import ml_collections

from atebm_jax import attacks, losses, models
from atebm_jax.stages import method
from atebm_jax.stages.method import Batch, Method, Stage, Variables, with_spread
from atebm_jax.stages.parts import attack

STREAMS = ("cls", "ood")


def build(model: nn.Module, config: ml_collections.ConfigDict) -> Stage:
    """0.5 E[CE(f(x_adv), y)] + 0.5 E[KL(uniform || p(. | x_ood))].

    The images outside the distribution are moved inside a ball to where the classifier
    is as confident as it can be. The attacks run in evaluation mode; the training pass
    uses the statistics of both halves of the batch together.
    """
    adversary = attacks.adversary(**config.adversary)
    confident = attacks.adversary(
        **config.ood_adversary,
        loss=lambda logits, labels: losses.from_uniform(logits),
    )

    def adversaries(
        key: None, variables: Variables, extra: Any, batch: Batch
    ) -> dict[str, jax.Array]:
        del key, extra
        image_shape, labels = batch["x_cls"].shape[1:], batch["y_cls"]
        logits_fn = models.freeze(model, variables, image_shape)
        x_adv = adversary(logits_fn, batch["x_cls"], labels)
        with jax.named_scope("outside"):
            x_confident = confident(logits_fn, batch["x_ood"], labels)
        return {"x_adv": x_adv, "x_confident": x_confident}

    def loss(
        params: Any, batch_stats: Any, batch: Batch, made: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        images = [made["x_adv"], made["x_confident"]]
        variables = {"params": params, "batch_stats": batch_stats}
        (adversarial, outside), batch_stats = models.one_pass(
            model, variables, images, frozen=False
        )
        outputs = method.classified(adversarial, batch["y_cls"])
        outputs["loss_uniform"] = losses.from_uniform(outside).mean()
        total = 0.5 * (outputs["loss_ce"] + outputs["loss_uniform"])
        return total, (batch_stats, outputs)

    return Stage(STREAMS, adversaries, loss, with_spread)


def _block(block: ml_collections.ConfigDict) -> None:
    # What makes images outside the distribution look confident; fields of `adversary`.
    block.ood_adversary = ml_collections.ConfigDict(block.adversary.to_dict())
    block.ood_adversary.epsilon = 1.0
    block.ood_adversary.num_steps = 20


METHOD = Method(
    STREAMS,
    build,
    block=_block,
    whole_batch=lambda block: True,
    parts=lambda block: {
        "adversary step": attack(block.adversary),
        "outside step": attack(block.ood_adversary, "outside/adversary/climb"),
    },
    # Both halves are differentiated.
    loss_passes=lambda block: 3 * 2,
)
