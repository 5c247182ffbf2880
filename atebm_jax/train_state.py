"""Everything that a resumed run needs, in one frozen state."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """State of one stage between two steps."""

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


def create(
    variables: Any,
    optimizer: optax.GradientTransformation,
    *,
    extra: Any = (),
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
    return {
        "params": state.average_params,
        "batch_stats": state.average_batch_stats,
    }
