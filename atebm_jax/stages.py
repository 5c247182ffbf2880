"""The two stages of the method, each a pair of functions (paper, section 4).

`adversaries` runs the PGD loops and is never differentiated; `loss` is what the
optimiser differentiates, with those images as constants.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from atebm_jax import ascent, attacks, energy, losses, metrics, models
from atebm_jax.errors import UserError

Batch = Mapping[str, jax.Array]
Variables = Mapping[str, Any]


class Stage(NamedTuple):
    """One of the two objectives.

    Attributes:
      name: "stage1" or "stage2".
      streams: the batches it takes, of "gen", "cls" and "ood".
      adversaries: (variables, batch, num_steps) -> images made by PGD and what is
        known of them; `num_steps` is T, a traced int32 (unused by stage 1).
      loss: (params, batch_stats, batch, adversaries) -> (scalar loss, (new
        batch_stats, outputs)); differentiable in params. The loss is a mean over the
        batch; of the outputs, scalars are means over it and arrays [B, ...] are per
        image.
      statistics: outputs of a whole batch -> scalar metrics. Apart from the loss, so
        that a batch may pass in parts and still be ranked as one.
    """

    name: str
    streams: tuple[str, ...]
    adversaries: Callable[[Variables, Batch, jax.Array], dict[str, jax.Array]]
    loss: Callable[..., tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]]
    statistics: Callable[[dict[str, jax.Array]], dict[str, jax.Array]] = dict


def stage1(model: nn.Module, config: ml_collections.ConfigDict) -> Stage:
    """Adversarial training: L_AT-CE = E[CE(f(x_adv), y)].

    The attack runs in evaluation mode (running statistics); only the training pass
    uses the batch's statistics and moves the running ones.

    Args:
      model: images to logits.
      config: `config.stage1`.
    """
    adversary = attacks.adversary(**config.adversary)

    def adversaries(
        variables: Variables, batch: Batch, num_steps: jax.Array
    ) -> dict[str, jax.Array]:
        del num_steps
        logits_fn = models.logits_fn(model, variables)
        return {"x_adv": adversary(logits_fn, batch["x_cls"], batch["y_cls"])}

    def loss(
        params: Any, batch_stats: Any, batch: Batch, made: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            made["x_adv"],
            train=True,
            mutable=["batch_stats"],
        )
        loss_ce = losses.cross_entropy(logits, batch["y_cls"]).mean()
        outputs = {
            "loss_ce": loss_ce,
            "accuracy_adv": metrics.accuracy(logits, batch["y_cls"]).mean(),
            "logits_adv": logits,
        }
        return loss_ce, (updated.get("batch_stats", {}), outputs)

    return Stage("stage1", ("cls",), adversaries, loss, _with_spread)


#: What contrastive images may ascend: f(x)[y], or logsumexp f(x).
CONTRASTIVE_OBJECTIVES = ("conditional", "marginal")


def stage2(model: nn.Module, config: ml_collections.ConfigDict) -> Stage:
    """Joint training: L_AT-CE + L_BCE + optionally R1, normalisation frozen.

    Contrastive images are T unbounded steps from the seeds towards the labels of the
    generative batch; the binary cross-entropy then tells real from contrastive by
    s(x) = -E(x).

    Args:
      model: images to logits; always applied in evaluation mode.
      config: `config.stage2`.

    Raises:
      UserError: unknown contrastive objective or a negative weight.
    """
    if config.contrastive_objective not in CONTRASTIVE_OBJECTIVES:
        raise UserError(
            f"unknown stage2.contrastive_objective {config.contrastive_objective!r}: "
            f"choose one of {', '.join(CONTRASTIVE_OBJECTIVES)}."
        )
    weights = {"ce": config.weight_ce, "bce": config.weight_bce, "r1": config.weight_r1}
    for name, weight in weights.items():
        if weight < 0:
            raise UserError(f"stage2.weight_{name} is {weight}: it must not be < 0.")
    adversary = attacks.adversary(**config.adversary)
    conditional = config.contrastive_objective == "conditional"
    step_size = config.contrastive_step_size
    with_r1 = config.weight_r1 > 0 or config.log_r1

    def adversaries(
        variables: Variables, batch: Batch, num_steps: jax.Array
    ) -> dict[str, jax.Array]:
        logits_fn = models.logits_fn(model, variables)
        labels = batch["y_gen"] if conditional else None
        x_contrastive = ascent.climb(
            lambda x: energy.score(logits_fn(x), labels),
            batch["x_ood"],
            step_size=step_size,
            num_steps=num_steps,
        )
        distance = ascent.l2_norm(x_contrastive - batch["x_ood"]).mean()
        longest = step_size * jnp.maximum(num_steps, 1).astype(jnp.float32)
        return {
            "x_contrastive": x_contrastive,
            "x_adv": adversary(logits_fn, batch["x_cls"], batch["y_cls"]),
            "seed_logits": logits_fn(batch["x_ood"]),
            "travel": distance / longest,
        }

    def loss(
        params: Any, batch_stats: Any, batch: Batch, made: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        logits_fn = models.logits_fn(
            model, {"params": params, "batch_stats": batch_stats}
        )
        real, contrastive, adversarial = _one_pass(
            logits_fn, batch["x_gen"], made["x_contrastive"], made["x_adv"]
        )
        loss_ce = losses.cross_entropy(adversarial, batch["y_cls"]).mean()
        loss_bce = losses.contrastive_bce(energy.score(real), energy.score(contrastive))
        total = weights["ce"] * loss_ce + weights["bce"] * loss_bce
        outputs = {
            "loss_ce": loss_ce,
            "loss_bce": loss_bce,
            "accuracy_adv": metrics.accuracy(adversarial, batch["y_cls"]).mean(),
            "logits_adv": adversarial,
            "travel": made["travel"],
            **_scores(real, contrastive, made["seed_logits"], batch["y_gen"]),
        }
        if with_r1:
            r1 = losses.r1(lambda x: energy.score(logits_fn(x)), batch["x_gen"])
            total = total + weights["r1"] * r1
            outputs["r1"] = r1
        return total, (batch_stats, outputs)

    return Stage("stage2", ("gen", "cls", "ood"), adversaries, loss, _with_aucs)


#: The two stages by name, from network and config block.
STAGES: dict[str, Callable[[nn.Module, ml_collections.ConfigDict], Stage]] = {
    "stage1": stage1,
    "stage2": stage2,
}


def _one_pass(logits_fn: Callable, *batches: jax.Array) -> list[jax.Array]:
    """Logits of several batches in one forward pass.

    Every image is on its own in evaluation mode, so the batches may share a pass.
    Interleaving keeps each image on its device; concatenating would move them all.
    """
    stacked = jnp.stack(batches, axis=1)
    images = stacked.reshape(-1, *stacked.shape[2:])
    logits = logits_fn(images).reshape(*stacked.shape[:2], -1)
    return [logits[:, i] for i in range(len(batches))]


def _scores(
    real: jax.Array, contrastive: jax.Array, seeds: jax.Array, labels: jax.Array
) -> dict[str, jax.Array]:
    """f(x)[y] of real images, contrastive images and seeds; mean s(x) of all three."""
    logits = {"real": real, "contrastive": contrastive, "seeds": seeds}
    joint = {f"joint_{name}": energy.score(x, labels) for name, x in logits.items()}
    means = {f"score_{name}": energy.score(x).mean() for name, x in logits.items()}
    return joint | means


def _with_spread(outputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """How far logits differ from image to image, in place of the logits [B, K].

    sqrt(mean_k Var_b f(x_b)[k]): 0 where all images of the batch get the same.
    """
    rest = {k: x for k, x in outputs.items() if k != "logits_adv"}
    variance = outputs["logits_adv"].astype(jnp.float32).var(axis=0)
    return rest | {"logit_spread": jnp.sqrt(variance.mean())}


def _with_aucs(outputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """AUCs of f(x)[y] against contrastive images and seeds in place of the scores."""
    outputs = _with_spread(outputs)
    means = {k: x for k, x in outputs.items() if not k.startswith("joint_")}
    real = outputs["joint_real"]
    return means | {
        "auc": metrics.auroc(real, outputs["joint_contrastive"]),
        "auc_seeds": metrics.auroc(real, outputs["joint_seeds"]),
    }
