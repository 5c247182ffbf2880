"""Optimisers, learning-rate schedules and the weight average (paper, appendix)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from atebm_jax.errors import UserError, check_choice

#: Training step [] int32 to learning rate [] float32.
Schedule = Callable[[jax.Array], jax.Array]


def sgd(*, weight_decay: float) -> optax.GradientTransformation:
    """SGD with Nesterov momentum 0.9 and coupled weight decay.

    g <- g + weight_decay * theta, v <- 0.9 * v + g, u = g + 0.9 * v. The decay covers
    every parameter, norm layers and biases included.

    Args:
      weight_decay: >= 0, added to the gradient before the momentum.

    Returns:
      The transformation from gradients to ascent directions; `apply` scales them.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(decay=0.9, nesterov=True),
    )


def adamw(*, weight_decay: float, b2: float = 0.95) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), eps 1e-8.

    Args:
      weight_decay: >= 0, times the learning rate, on every parameter.
      b2: decay of the second moment, that of the first is 0.9; the paper has 0.95.

    Returns:
      The transformation from gradients to ascent directions; `apply` scales them.
    """
    return optax.chain(
        optax.scale_by_adam(b1=0.9, b2=b2, eps=1e-8),
        optax.add_decayed_weights(weight_decay),
    )


#: Optimisers by name.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": sgd,
    "adamw": adamw,
    # Kingma and Ba's b2.
    "adam": partial(adamw, b2=0.999),
}


def optimizer(name: str, *, weight_decay: float) -> optax.GradientTransformation:
    """Builds an optimiser by name, a key of `OPTIMIZERS`.

    Raises:
      UserError: unknown name or negative weight decay.
    """
    check_choice("optimizer", name, OPTIMIZERS)
    if not 0 <= weight_decay < math.inf:
        raise UserError(
            f"weight_decay is {weight_decay}: it must be finite and not negative."
        )
    return OPTIMIZERS[name](weight_decay=weight_decay)


def apply(
    transformation: optax.GradientTransformation,
    gradients: Any,
    optimizer_state: Any,
    params: Any,
    learning_rate: jax.Array,
) -> tuple[Any, Any]:
    """One descent step: theta - learning_rate * u.

    Returns:
      (new parameters, new optimiser state).
    """
    directions, optimizer_state = transformation.update(
        gradients, optimizer_state, params
    )
    params = jax.tree.map(lambda p, u: p - learning_rate * u, params, directions)
    return params, optimizer_state


#: Names of learning-rate schedules.
SCHEDULES = ("constant", "cosine", "step")


def schedule(
    name: str,
    *,
    peak: float,
    num_steps: int,
    warmup_steps: int = 0,
    decay_at: tuple[float, ...] = (0.5, 0.75),
    decay_factor: float = 0.1,
) -> Schedule:
    """Learning rate by training step.

    Args:
      name: "constant"; "cosine", to 0 at `num_steps`; or "step", multiplied by
        `decay_factor` at each of the fractions `decay_at` of `num_steps`.
      peak: learning rate after the warm-up.
      num_steps: total number of training steps, the warm-up included.
      warmup_steps: steps of linear rise from peak / (warmup_steps + 1).
      decay_at: fractions of `num_steps` in (0, 1), for "step".
      decay_factor: in (0, 1], for "step".

    Returns:
      step [] int32 -> learning rate [] float32.

    Raises:
      UserError: unknown name, or a value outside its range.
    """
    check_choice("schedule", name, SCHEDULES)
    if not 0 <= warmup_steps <= num_steps:
        raise UserError(
            f"warmup_steps is {warmup_steps}: it must lie between 0 and the stage's "
            f"{num_steps} steps."
        )
    if not all(0 < fraction < 1 for fraction in decay_at):
        raise UserError(f"decay_at is {decay_at}: its fractions must lie in (0, 1).")
    if not 0 < decay_factor <= 1:
        raise UserError(f"decay_factor is {decay_factor}: it must lie in (0, 1].")
    remaining = max(num_steps - warmup_steps, 1)
    after: Schedule
    if name == "constant":
        after = optax.constant_schedule(peak)
    elif name == "cosine":
        after = optax.cosine_decay_schedule(peak, remaining)
    else:
        # Boundaries count from the end of the warm-up, fractions from the start; those
        # that fall on one step all count.
        boundaries: dict[int, float] = {}
        for fraction in decay_at:
            at = max(round(fraction * num_steps) - warmup_steps, 0)
            boundaries[at] = boundaries.get(at, 1.0) * decay_factor
        after = optax.piecewise_constant_schedule(peak, boundaries)
    if warmup_steps == 0:
        return after
    rise = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    return optax.join_schedules([rise, after], [warmup_steps])


def average(
    averages: Any, values: Any, num_averages: jax.Array, max_decay: float = 0.999
) -> Any:
    """Exponential average with warm-up: avg <- d * avg + (1 - d) * value.

    d = min(max_decay, (1 + n) / (10 + n)) with n the number of averages so far; the
    first one (n = 0) copies.

    Args:
      averages: pytree of float arrays.
      values: pytree of the same structure.
      num_averages: [] int32, n.
      max_decay: 0.999 in the paper.

    Returns:
      The new averages.
    """
    n = num_averages.astype(jnp.float32)
    decay = jnp.minimum(max_decay, (1.0 + n) / (10.0 + n))

    def move(old: jax.Array, value: jax.Array) -> jax.Array:
        # Written as a step towards the value, which leaves a constant bit by bit.
        moved = old + (1.0 - decay) * (value - old)
        return jnp.where(num_averages == 0, value, moved)

    return jax.tree.map(move, averages, values)
