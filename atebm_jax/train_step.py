"""One update of the parameters as a pure function of state and batch, and the state."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from atebm_jax import optim
from atebm_jax.stages import Batch, Stage

# Keeps the noise of training apart from that of samples under the same seed.
_TRAINING_SEEDS = 0x7261696E


@flax.struct.dataclass
class TrainState:
    """State of one stage between two steps: all that a resumed run needs."""

    step: jax.Array  #: [] int32, steps taken, skipped ones included
    data_offset: jax.Array  #: [] int32, data position minus step; grows on rollback
    params: Any  #: float32 pytree
    batch_stats: Any  #: float32 pytree, running statistics; empty without BatchNorm
    optimizer: Any  #: optax state
    average_params: Any  #: as params: what evaluation and sampling use
    average_batch_stats: Any  #: as batch_stats
    num_averages: jax.Array  #: [] int32, averages so far
    extra: Any  #: of the stage (`stages.Stage.init`): T and the AUC window, or none
    skipped: jax.Array  #: [] int32, steps not applied because of NaN or Inf
    skipped_in_row: jax.Array  #: [] int32, of these the latest uninterrupted ones
    rollbacks: jax.Array  #: [] int32, returns to an earlier checkpoint


StepFn = Callable[
    [TrainState, Mapping[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]
]


def create_state(
    variables: Any, optimizer: optax.GradientTransformation, *, extra: Any = ()
) -> TrainState:
    """A fresh state from a network's variables.

    The averages get their own buffers, so that a step may donate the whole state.

    Args:
      variables: {"params": ..., optionally "batch_stats": ...}.
      optimizer: as of `optim.optimizer`.
      extra: the stage's own state, as of `stages.Stage.init`.
    """
    params = variables["params"]
    batch_stats = variables.get("batch_stats", {})
    # One buffer each: a donated state must not hold an array twice.
    zeros = [jnp.zeros((), jnp.int32) for _ in range(6)]
    return TrainState(
        step=zeros[0],
        data_offset=zeros[1],
        params=params,
        batch_stats=batch_stats,
        optimizer=optimizer.init(params),
        average_params=jax.tree.map(jnp.copy, params),
        average_batch_stats=jax.tree.map(jnp.copy, batch_stats),
        num_averages=zeros[2],
        extra=extra,
        skipped=zeros[3],
        skipped_in_row=zeros[4],
        rollbacks=zeros[5],
    )


def average_variables(state: TrainState) -> dict[str, Any]:
    """The averaged network: what evaluates, samples and starts the next stage."""
    return {"params": state.average_params, "batch_stats": state.average_batch_stats}


def make(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    learning_rate: optim.Schedule,
    *,
    seed: int = 0,
    max_decay: float = 0.999,
    num_micro_batches: int = 1,
    rollback_factor: float = 1.0,
    gather: Callable[[Any], Any] = lambda params: params,
    scatter: Callable[[Any], Any] = lambda gradients: gradients,
) -> StepFn:
    """Builds the update of one stage; one compilation serves every T.

    The PGD loops run before, and outside, the differentiation with respect to the
    parameters. Where loss or gradient is not finite nothing is applied: parameters,
    averages, optimiser and extra state stay, and the step is counted as skipped.

    Args:
      stage: adversaries and loss.
      optimizer: from gradients to ascent directions (`optim.optimizer`).
      learning_rate: step -> learning rate.
      seed: of the uniform noise that serves as seeds when a batch has no "x_ood", and
        of the stage's own random numbers.
      max_decay: limit of the weight average's decay.
      num_micro_batches: parts k in which a batch passes one after the other, loops
        and gradients alike, to need about 1/k of the memory. One update of the mean
        gradient follows, and the metrics are those of the whole batch. B must be a
        multiple of k, and of k times the devices it is split over.
      rollback_factor: the learning rate is multiplied by it at each rollback that the
        state counts; in (0, 1].
      gather: applied to the parameters once, before all loops; makes them whole on
        every device where the state is split over several.
      scatter: applied to the gradients, before everything elementwise; splits them as
        the state is.

    Returns:
      (state, batch) -> (state, metrics). Images of the batch are uint8 [B, H, W, C] or
      float32 in [0, 1], labels int32 [B]; metrics are scalars.

    Raises:
      ValueError: `num_micro_batches` is not positive.
    """
    if num_micro_batches < 1:
        raise ValueError(
            f"num_micro_batches is {num_micro_batches}: it must be at least 1."
        )
    differentiate = _in_parts(stage, num_micro_batches)

    def step(
        state: TrainState, batch: Mapping[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        # Keys are derived from seed and data position, never stored.
        key = jax.random.fold_in(jax.random.key(seed), _TRAINING_SEEDS)
        key = jax.random.fold_in(key, state.step + state.data_offset)
        loss, gradients, batch_stats, outputs = differentiate(
            jax.random.fold_in(key, 1) if stage.needs_key else None,
            gather(state.params),
            state.batch_stats,
            _prepare(batch, stage, key),
            state.extra,
        )
        gradients = scatter(gradients)
        metrics = stage.statistics(outputs)
        # Exactly the schedule's rate where nothing was rolled back: x ** 0 is 1.
        lowered = jnp.float32(rollback_factor) ** state.rollbacks.astype(jnp.float32)
        rate = learning_rate(state.step) * lowered
        gradient_norm = optax.tree.norm(gradients)
        applied = _apply(state, optimizer, gradients, batch_stats, rate, max_decay)
        extra = stage.update(state.extra, {**outputs, **metrics})
        applied = replace(applied, extra=extra)
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        new_state = _keep_if(finite, applied, state)
        return new_state, {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "learning_rate": jnp.asarray(rate, jnp.float32),
            "skipped": new_state.skipped,
            "skipped_in_row": new_state.skipped_in_row,
            **stage.shown(state.extra),
            **metrics,
        }

    return step


def _in_parts(
    stage: Stage, count: int
) -> Callable[[Any, Any, Any, Batch, Any], tuple[jax.Array, Any, Any, Any]]:
    """PGD loops, loss and gradient of a batch that passes in `count` parts.

    Returns:
      (key, params, batch_stats, batch, extra) -> (loss, gradients, batch_stats,
      outputs), of the whole batch.
    """
    gradient = jax.value_and_grad(stage.loss, has_aux=True)

    def whole(key: Any, params: Any, batch_stats: Any, batch: Batch, extra: Any) -> Any:
        inputs = _as_floats(batch)
        variables = {"params": params, "batch_stats": batch_stats}
        made = jax.lax.stop_gradient(stage.adversaries(key, variables, extra, inputs))
        (loss, (batch_stats, outputs)), gradients = gradient(
            params, batch_stats, inputs, made
        )
        return loss, gradients, batch_stats, outputs

    def in_parts(
        key: Any, params: Any, batch_stats: Any, batch: Batch, extra: Any
    ) -> Any:
        def add(carry: Any, part: tuple[Any, Batch, Any]) -> tuple[Any, Any]:
            total, gradients, batch_stats = carry
            key, batch, own = part
            loss, more, batch_stats, outputs = whole(
                key, params, batch_stats, batch, own if stage.split_extra else extra
            )
            gradients = jax.tree.map(jnp.add, gradients, more)
            return (total + loss, gradients, batch_stats), outputs

        keys = None if key is None else jax.random.split(key, count)
        own = _split(extra, count) if stage.split_extra else None
        nothing = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params), batch_stats)
        with jax.named_scope("parts"):
            (total, gradients, batch_stats), outputs = jax.lax.scan(
                add, nothing, (keys, _split(batch, count), own)
            )
        gradients = jax.tree.map(lambda g: g / count, gradients)
        return total / count, gradients, batch_stats, _join(outputs)

    return whole if count == 1 else in_parts


def _split(batch: Any, count: int) -> Any:
    """[B, ...] -> [count, B / count, ...], part j being images j, j + count, ...

    Neighbours go to different parts, so that every device splits what it holds;
    cutting the batch into stretches would move images between devices.
    """

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % count:
            raise ValueError(
                f"a batch of {x.shape[0]} does not split into {count} micro-batches: "
                "use a divisor."
            )
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def _join(outputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Undoes `_split` for values per image [k, B / k]; averages the means [k]."""
    return {
        name: x.mean() if x.ndim == 1 else x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
        for name, x in outputs.items()
    }


def _prepare(batch: Mapping[str, jax.Array], stage: Stage, key: jax.Array) -> Batch:
    """The batch, with uniform noise where no seeds came with it."""
    inputs = dict(batch)
    if "ood" in stage.streams and "x_ood" not in inputs:
        like = next(x for name, x in inputs.items() if name.startswith("x_"))
        inputs["x_ood"] = jax.random.uniform(key, like.shape)
    return inputs


def _as_floats(batch: Batch) -> Batch:
    """Images to float32 in [0, 1]; only of a part, as bytes are a quarter of that."""
    return {
        name: value.astype(jnp.float32) / 255.0 if value.dtype == jnp.uint8 else value
        for name, value in batch.items()
    }


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
