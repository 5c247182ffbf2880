"""The loop around a sampler: gradients, schedule, constraint, a stop per image."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from atebm_jax.samplers.base import ProjectFn, Sampler, clip
from atebm_jax.samplers.schedules import SCHEDULES, ScheduleFn


def run(
    sampler: Sampler,
    objective: Callable[[jax.Array], jax.Array],
    seeds: jax.Array,
    keys: jax.Array,
    *,
    step_size: jax.Array | float,
    num_steps: jax.Array | int,
    schedule: ScheduleFn = SCHEDULES["constant"],
    project: ProjectFn = clip,
    target: jax.Array | float | None = None,
) -> jax.Array:
    """Raises a per-image score from seeds.

    Images never see one another: the loop needs no communication between devices, and
    an image depends on its seed and key alone.

    Args:
      sampler: one of `SAMPLERS`.
      objective: images [B, H, W, C] -> scores [B], -E(x) or -E(x, y).
      seeds: [B, H, W, C] float32 in [0, 1].
      keys: [B] one key an image; step t folds t in.
      step_size: as of the sampler; one for all or [B, 1, 1, 1].
      num_steps: >= 0; a traced int32 never recompiles.
      schedule: factor of the step size in each step.
      project: constraint on the images, which also keeps them in [0, 1].
      target: score at which an image stays as it is, minus a target energy; None for
        all steps. The others go on, and the loop runs its steps.

    Returns:
      [B, H, W, C] images in [0, 1].
    """
    state = proceed(
        sampler,
        objective,
        sampler.init(seeds),
        keys,
        first=0,
        last=num_steps,
        step_size=step_size,
        schedule=schedule,
        project=project,
        target=target,
    )
    return state.images


def proceed(
    sampler: Sampler,
    objective: Callable[[jax.Array], jax.Array],
    state: Any,
    keys: jax.Array,
    *,
    first: jax.Array | int,
    last: jax.Array | int,
    step_size: jax.Array | float,
    schedule: ScheduleFn = SCHEDULES["constant"],
    project: ProjectFn = clip,
    target: jax.Array | float | None = None,
) -> Any:
    """`run` in parts: one trajectory, several ends. A schedule is that of `last` steps.

    Args:
      state: after `first` steps; `sampler.init(seeds)` after none.
      first, last: numbers of steps that are done and shall be; traced int32 never
        recompile.

    Returns:
      The state after `last` steps; its `images` are those of `run`.
    """
    advance = _step(
        sampler,
        lambda x: (objective(x), None),
        keys,
        step_size=step_size,
        num_steps=last,
        schedule=schedule,
        project=project,
        target=target,
    )
    lower, upper = jnp.asarray(first, jnp.int32), jnp.asarray(last, jnp.int32)
    state, _ = jax.lax.fori_loop(lower, upper, advance, (state, None))
    return state


def trace(
    sampler: Sampler,
    objective: Callable[[jax.Array], tuple[jax.Array, Any]],
    seeds: jax.Array,
    keys: jax.Array,
    *,
    capacity: int,
    step_size: jax.Array | float,
    num_steps: jax.Array | int,
    schedule: ScheduleFn = SCHEDULES["constant"],
    project: ProjectFn = clip,
    target: jax.Array | float | None = None,
) -> tuple[jax.Array, Any]:
    """`run` that keeps readings of the images along the way, but no images.

    Costs one evaluation of the objective more than `run`.

    Args:
      objective: images [B, H, W, C] -> (scores [B], readings: a tree of [B] arrays).
      capacity: greatest number of steps, which sizes the record: `num_steps` may be
        traced. Readings beyond it are lost.

    Returns:
      images [B, H, W, C] and the readings, [capacity + 1, B]: row t before step t, row
      `num_steps` of the result, zeros after it.
    """
    number = jnp.asarray(num_steps, jnp.int32)
    advance = _step(
        sampler,
        objective,
        keys,
        step_size=step_size,
        num_steps=number,
        schedule=schedule,
        project=project,
        target=target,
    )
    shapes = jax.eval_shape(objective, seeds)[1]
    empty = jax.tree.map(lambda s: jnp.zeros((capacity + 1, *s.shape), s.dtype), shapes)
    first = (sampler.init(seeds), empty)
    state, record = jax.lax.fori_loop(0, number, advance, first)
    return state.images, _write(record, number, objective(state.images)[1])


def _step(
    sampler: Sampler,
    objective: Callable[[jax.Array], tuple[jax.Array, Any]],
    keys: jax.Array,
    *,
    step_size: jax.Array | float,
    num_steps: jax.Array | int,
    schedule: ScheduleFn,
    project: ProjectFn,
    target: jax.Array | float | None,
) -> Callable[[jax.Array, tuple[Any, Any]], tuple[Any, Any]]:
    number = jnp.asarray(num_steps, jnp.int32)

    def advance(step: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        state, record = carry
        scores, pullback, readings = jax.vjp(objective, state.images, has_aux=True)
        record = _write(record, step, readings)
        (gradients,) = pullback(jnp.ones_like(scores))
        size = step_size * schedule(step, number)
        now = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
        new = sampler.step(now, gradients, state, size, project)
        if target is None:
            return new, record
        going = (scores < target)[:, None, None, None]
        new = jax.tree.map(lambda a, b: jnp.where(going, a, b), new, state)
        return new, record

    return advance


def _write(record: Any, row: jax.Array, readings: Any) -> Any:
    return jax.tree.map(lambda kept, new: kept.at[row].set(new), record, readings)
