"""JEM: a classifier that learns p(x) from chains of Langevin dynamics.

Grathwohl et al., ICLR 2020 (arXiv 1912.03263): what the paper compares with, on the
network, data and evaluation of the config. Numbers are those of images in [0, 1].
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from atebm_jax import ascent, energy, metrics, models
from atebm_jax.errors import UserError
from atebm_jax.stages import method
from atebm_jax.stages.method import Batch, Method, Stage, Variables, with_spread
from atebm_jax.stages.parts import CONTRASTIVE, Part

STREAMS = ("gen", "cls")


def build(model: nn.Module, config: ml_collections.ConfigDict) -> Stage:
    """CE(f(x), y) - [mean s(x_real) - mean s(x_q)], with s = logsumexp f.

    The chains x_q live in a replay buffer [B, N / B, H, W, C]: each place of the batch
    has chains of its own. So the buffer is split over devices as the batch is, and
    nothing of it is sent.

    Args:
      model: images to logits, in evaluation mode throughout. JEM's networks have no
        normalisation layers; where there are any, they keep the statistics that they
        begin with.
      config: the block of the stage.
    """
    chains = _chains(config)
    rule = ascent.sgld(config.sgld_noise)

    def init(key: jax.Array, image_shape: tuple[int, ...]) -> jax.Array:
        return jax.random.uniform(key, (config.batch_size, chains, *image_shape))

    def adversaries(
        key: jax.Array, variables: Variables, extra: jax.Array, batch: Batch
    ) -> dict[str, jax.Array]:
        image_shape = batch["x_gen"].shape[1:]
        logits_fn = models.freeze(model, variables, image_shape)
        keys = jax.random.split(key, 6)
        places, start = _starts(keys[:3], extra, config.fresh_share)
        sampled = ascent.climb(
            lambda x: energy.score(logits_fn(x)),
            start,
            rule,
            keys=jax.random.split(keys[3], len(start)),
            step_size=config.sgld_step_size,
            num_steps=config.sgld_steps,
            project=lambda x: x,
        )
        made = {"x_sampled": sampled, "places": places}
        for name, noise_key in (("x_gen", keys[4]), ("x_cls", keys[5])):
            noise = jax.random.normal(noise_key, batch[name].shape)
            made[name] = batch[name] + config.image_noise * noise
        return made

    def loss(
        params: Any, batch_stats: Any, batch: Batch, made: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        images = [made["x_cls"], made["x_gen"], made["x_sampled"]]
        variables = {"params": params, "batch_stats": batch_stats}
        (clean, real, sampled), _ = models.one_pass(
            model, variables, images, frozen=True
        )
        scores = {"real": energy.score(real), "contrastive": energy.score(sampled)}
        outputs = {
            **method.classified(clean, batch["y_cls"], "accuracy"),
            "loss_energy": scores["contrastive"].mean() - scores["real"].mean(),
            "x_sampled": made["x_sampled"],
            "places": made["places"],
            **{f"each_{name}": value for name, value in scores.items()},
        }
        return outputs["loss_ce"] + outputs["loss_energy"], (batch_stats, outputs)

    return Stage(
        streams=STREAMS,
        adversaries=adversaries,
        loss=loss,
        statistics=_statistics,
        init=init,
        update=_write_back,
        needs_key=True,
        split_extra=True,
    )


def _chains(block: ml_collections.ConfigDict) -> int:
    """Chains of each place of the batch; the buffer is rounded up to whole batches."""
    return -(-block.buffer_size // block.batch_size)


def _starts(
    keys: jax.Array, buffer: jax.Array, fresh_share: float
) -> tuple[jax.Array, jax.Array]:
    """Where chains go on: a random place of each row, or fresh noise instead.

    Returns:
      (places [B] int32 that the results go back to, images [B, H, W, C]).
    """
    number, chains = buffer.shape[:2]
    places = jax.random.randint(keys[0], (number,), 0, chains)
    kept = jnp.where(_at(places, chains), buffer, 0.0).sum(axis=1)
    fresh = jax.random.bernoulli(keys[1], fresh_share, (number, 1, 1, 1))
    noise = jax.random.uniform(keys[2], kept.shape)
    return places, jnp.where(fresh, noise, kept)


def _write_back(buffer: jax.Array, outputs: Mapping[str, jax.Array]) -> jax.Array:
    at = _at(outputs["places"], buffer.shape[1])
    return jnp.where(at, outputs["x_sampled"][:, None], buffer)


def _at(places: jax.Array, chains: int) -> jax.Array:
    """Mask [B, N / B, 1, 1, 1]: comparing, unlike indexing, never leaves a device."""
    return (jnp.arange(chains)[None] == places[:, None])[:, :, None, None, None]


def _statistics(outputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Scalars alone: mean s(x) of real images and chains, and the AUC between them."""
    outputs = with_spread(outputs)
    real, sampled = outputs["each_real"], outputs["each_contrastive"]
    return {name: x for name, x in outputs.items() if x.ndim == 0} | {
        "score_real": real.mean(),
        "score_contrastive": sampled.mean(),
        "auc": metrics.auroc(real, sampled),
    }


def _block(block: ml_collections.ConfigDict) -> None:
    del block.adversary
    block.batch_size = 64
    block.optimizer = "adam"
    block.learning_rate = 1e-4
    block.weight_decay = 0.0
    block.warmup_steps = 1000
    block.schedule = "step"
    block.decay_at = (0.8, 0.9)
    block.decay_factor = 0.3
    # SGLD: steps, factor of the gradient, standard deviation of the noise in pixels.
    block.sgld_steps = 20
    block.sgld_step_size = 0.25
    block.sgld_noise = 0.005
    # Images of the replay buffer, and the share of chains that begin anew each step.
    block.buffer_size = 10_000
    block.fresh_share = 0.05
    # Standard deviation of the noise on real images, pixels.
    block.image_noise = 0.015


def _check(name: str, block: ml_collections.ConfigDict) -> None:
    limits = {
        "sgld_steps": (0, math.inf),
        "buffer_size": (1, math.inf),
        "fresh_share": (0, 1),
        "image_noise": (0, math.inf),
        "sgld_noise": (0, math.inf),
    }
    for field, (least, most) in limits.items():
        if not least <= block[field] <= most:
            upto = "" if most == math.inf else f" and at most {most}"
            raise UserError(
                f"config.{name}.{field} is {block[field]}: it must be at least "
                f"{least}{upto}."
            )


METHOD = Method(
    STREAMS,
    build,
    block=_block,
    check=_check,
    parts=lambda block: {CONTRASTIVE: Part(block.sgld_steps, energy.score, "climb")},
    loss_passes=lambda block: 3 * 3,
)
