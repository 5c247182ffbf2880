"""Joint training of classifier and energy: stage 2 (paper, section 4)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from atebm_jax import ascent, attacks, curriculum, energy, losses, metrics, models
from atebm_jax.curriculum import Curriculum
from atebm_jax.errors import UserError, check_choice
from atebm_jax.stages import method
from atebm_jax.stages.method import Batch, Method, Stage, Variables, with_spread
from atebm_jax.stages.parts import CONTRASTIVE, Part, attack

STREAMS = ("gen", "cls", "ood")

CHOICES = {
    # What contrastive images ascend: f(x)[y], or logsumexp f(x).
    "contrastive_objective": ("conditional", "marginal"),
    # How normalisation layers train: stage 1's running statistics, or the batch's.
    "normalization": ("frozen", "batch"),
}


def build(model: nn.Module, config: ml_collections.ConfigDict) -> Stage:
    """L_AT-CE + L_BCE + optionally R1, normalisation frozen unless asked otherwise.

    Contrastive images are T unbounded steps from the seeds towards the labels of the
    generative batch; the binary cross-entropy then tells real from contrastive by
    s(x) = -E(x).

    Args:
      model: images to logits; applied in evaluation mode, but for the loss where
        `normalization` is "batch".
      config: the block of the stage.

    Raises:
      UserError: unknown contrastive objective or normalisation, or a negative weight.
    """
    for field, choices in CHOICES.items():
        check_choice(f"stage2.{field}", config[field], choices)
    weights = {"ce": config.weight_ce, "bce": config.weight_bce, "r1": config.weight_r1}
    for name, weight in weights.items():
        if weight < 0:
            raise UserError(f"stage2.weight_{name} is {weight}: it must not be < 0.")
    adversary = attacks.adversary(**config.adversary)
    conditional = config.contrastive_objective == "conditional"
    step_size = config.contrastive_step_size
    with_r1 = config.weight_r1 > 0 or config.log_r1

    def adversaries(
        key: None, variables: Variables, extra: Curriculum, batch: Batch
    ) -> dict[str, jax.Array]:
        del key
        num_steps = extra.num_steps
        shape = batch["x_ood"].shape[1:]
        logits_fn = models.freeze(model, variables, shape)
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
        variables = {"params": params, "batch_stats": batch_stats}
        (real, contrastive, adversarial), after = models.one_pass(
            model,
            variables,
            [batch["x_gen"], made["x_contrastive"], made["x_adv"]],
            frozen=config.normalization == "frozen",
        )
        loss_bce = losses.contrastive_bce(energy.score(real), energy.score(contrastive))
        outputs = {
            **method.classified(adversarial, batch["y_cls"]),
            "loss_bce": loss_bce,
            "travel": made["travel"],
            **_scores(real, contrastive, made["seed_logits"], batch["y_gen"]),
        }
        total = weights["ce"] * outputs["loss_ce"] + weights["bce"] * loss_bce
        if with_r1:
            logits_fn = models.logits_fn(model, variables)
            r1 = losses.r1(lambda x: energy.score(logits_fn(x)), batch["x_gen"])
            total = total + weights["r1"] * r1
            outputs["r1"] = r1
        return total, (after, outputs)

    def update(extra: Curriculum, figures: dict[str, jax.Array]) -> Curriculum:
        return curriculum.update(
            extra,
            figures["auc"],
            threshold=config.auc_threshold,
            max_steps=config.t_max,
        )

    return Stage(
        streams=STREAMS,
        adversaries=adversaries,
        loss=loss,
        statistics=_with_aucs,
        init=lambda key, image_shape: curriculum.init(_window(config), config.t_start),
        update=update,
        shown=lambda extra: {"T": extra.num_steps},
    )


def _scores(
    real: jax.Array, contrastive: jax.Array, seeds: jax.Array, labels: jax.Array
) -> dict[str, jax.Array]:
    """f(x)[y] of real images, contrastive images and seeds; mean s(x) of all three."""
    logits = {"real": real, "contrastive": contrastive, "seeds": seeds}
    joint = {f"joint_{name}": energy.score(x, labels) for name, x in logits.items()}
    means = {f"score_{name}": energy.score(x).mean() for name, x in logits.items()}
    return joint | means


def _with_aucs(outputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """AUCs of f(x)[y] against contrastive images and seeds in place of the scores."""
    outputs = with_spread(outputs)
    means = {k: x for k, x in outputs.items() if not k.startswith("joint_")}
    real = outputs["joint_real"]
    return means | {
        "auc": metrics.auroc(real, outputs["joint_contrastive"]),
        "auc_seeds": metrics.auroc(real, outputs["joint_seeds"]),
    }


def _block(block: ml_collections.ConfigDict) -> None:
    block.schedule = "constant"
    # What contrastive images ascend: "conditional" f(x)[y] or "marginal" logsumexp.
    block.contrastive_objective = "conditional"
    # L2 pixels per contrastive step.
    block.contrastive_step_size = 0.1
    # T of the first step, and T_max, where it stops growing; equal for no curriculum.
    block.t_start = 0
    block.t_max = 50
    # Mean AUC of a full window at which T grows by one.
    block.auc_threshold = 0.8
    # Images in the AUC window: ceil(auc_window_images / batch_size) steps.
    block.auc_window_images = 1000
    # "frozen": BatchNorm keeps stage 1's running statistics; "batch": statistics of
    # real, contrastive and adversarial images together, as an ablation.
    block.normalization = "frozen"
    # Weights of the terms of the loss.
    block.weight_ce = 1.0
    block.weight_bce = 1.0
    block.weight_r1 = 0.0
    # Compute and log R1 although its weight is 0 (costs a double backward pass).
    block.log_r1 = False


def _check(name: str, block: ml_collections.ConfigDict) -> None:
    if not 0 <= block.t_start <= block.t_max:
        raise UserError(
            f"config.{name}.t_start is {block.t_start} and config.{name}.t_max "
            f"{block.t_max}: T grows from the first to the second, both >= 0."
        )
    if not 0 <= block.auc_threshold <= 1:
        raise UserError(
            f"config.{name}.auc_threshold is {block.auc_threshold}: an AUC lies in "
            "[0, 1]."
        )


def _window(block: ml_collections.ConfigDict) -> int:
    return curriculum.window_length(block.auc_window_images, block.batch_size)


METHOD = Method(
    STREAMS,
    build,
    block=_block,
    check=_check,
    whole_batch=lambda block: block.normalization == "batch",
    starts_from="stage1",
    classifies=lambda block: block.weight_ce > 0,
    curriculum=True,
    window=_window,
    parts=lambda block: {
        CONTRASTIVE: Part(block.t_max, energy.score, "climb"),
        "seed scores": Part(1, energy.score),
        "adversary step": attack(block.adversary),
    },
    # Of three sets of images, and of R1, which differentiates twice.
    loss_passes=lambda block: 3 * 3 + 6 * (block.weight_r1 > 0 or block.log_r1),
)
