"""One update of the parameters as a pure function of state and batch."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from atebm_jax import curriculum, optim
from atebm_jax.stages import Batch, Stage
from atebm_jax.train_state import TrainState

# Keeps the noise of training apart from that of samples under the same seed.
_TRAINING_SEEDS = 0x7261696E

StepFn = Callable[
    [TrainState, Mapping[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]
]


def make(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    learning_rate: optim.Schedule,
    *,
    seed: int = 0,
    max_decay: float = 0.999,
    auc_threshold: float = 1.0,
    max_contrastive_steps: int = 0,
) -> StepFn:
    """Builds the update of one stage; one compilation serves every T.

    The PGD loops run before, and outside, the differentiation with respect to the
    parameters. Where loss or gradient is not finite nothing is applied: parameters,
    averages, optimiser and curriculum stay, and the step is counted as skipped.

    Args:
      stage: adversaries and loss.
      optimizer: from gradients to ascent directions (`optim.optimizer`).
      learning_rate: step -> learning rate.
      seed: of the uniform noise that serves as seeds when a batch has no "x_ood".
      max_decay: limit of the weight average's decay.
      auc_threshold: mean AUC at which T grows; stage 2 only.
      max_contrastive_steps: T_max; stage 2 only.

    Returns:
      (state, batch) -> (state, metrics). Images of the batch are uint8 [B, H, W, C] or
      float32 in [0, 1], labels int32 [B]; metrics are scalars.
    """
    gradient = jax.value_and_grad(stage.loss, has_aux=True)

    def step(
        state: TrainState, batch: Mapping[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        inputs = _prepare(batch, stage, seed, state.step + state.data_offset)
        num_steps = state.curriculum.num_steps
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        made = jax.lax.stop_gradient(stage.adversaries(variables, inputs, num_steps))
        (loss, (batch_stats, metrics)), gradients = gradient(
            state.params, state.batch_stats, inputs, made
        )
        rate = learning_rate(state.step)
        gradient_norm = optax.tree.norm(gradients)
        applied = _apply(state, optimizer, gradients, batch_stats, rate, max_decay)
        if "auc" in metrics:
            applied = replace(
                applied,
                curriculum=curriculum.update(
                    state.curriculum,
                    metrics["auc"],
                    threshold=auc_threshold,
                    max_steps=max_contrastive_steps,
                ),
            )
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        new_state = _keep_if(finite, applied, state)
        return new_state, {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "learning_rate": jnp.asarray(rate, jnp.float32),
            "skipped": new_state.skipped,
            "skipped_in_row": new_state.skipped_in_row,
            **({"T": num_steps} if "auc" in metrics else {}),
            **metrics,
        }

    return step


def _prepare(
    batch: Mapping[str, jax.Array], stage: Stage, seed: int, position: jax.Array
) -> Batch:
    """Images to float32 in [0, 1]; uniform noise where no seeds came with the batch."""
    inputs = {
        name: value.astype(jnp.float32) / 255.0 if value.dtype == jnp.uint8 else value
        for name, value in batch.items()
    }
    if "ood" in stage.streams and "x_ood" not in inputs:
        # Keys are derived from seed and data position, never stored.
        key = jax.random.fold_in(jax.random.key(seed), _TRAINING_SEEDS)
        key = jax.random.fold_in(key, position)
        inputs["x_ood"] = jax.random.uniform(key, inputs["x_gen"].shape)
    return inputs


def _apply(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    gradients: Any,
    batch_stats: Any,
    rate: jax.Array,
    max_decay: float,
) -> TrainState:
    params, optimizer_state = optim.apply(
        optimizer, gradients, state.optimizer, state.params, rate
    )
    average_params, average_batch_stats = optim.average(
        (state.average_params, state.average_batch_stats),
        (params, batch_stats),
        state.num_averages,
        max_decay,
    )
    return replace(
        state,
        params=params,
        batch_stats=batch_stats,
        optimizer=optimizer_state,
        average_params=average_params,
        average_batch_stats=average_batch_stats,
        num_averages=state.num_averages + 1,
    )


def _keep_if(finite: jax.Array, applied: TrainState, state: TrainState) -> TrainState:
    """The applied state where the step was finite, else the old one; counts both."""
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), applied, state)
    broken = (~finite).astype(jnp.int32)
    return replace(
        kept,
        step=state.step + 1,
        skipped=state.skipped + broken,
        skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
    )
