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
      step_size: as of the sampler.
      num_steps: >= 0; a traced int32 never recompiles.
      schedule: factor of the step size in each step.
      project: constraint on the images, which also keeps them in [0, 1].
      target: score at which an image stays as it is, minus a target energy; None for
        all steps. The others go on, and the loop runs its steps.

    Returns:
      [B, H, W, C] images in [0, 1].
    """
    number = jnp.asarray(num_steps, jnp.int32)

    def advance(step: jax.Array, state: Any) -> Any:
        scores, pullback = jax.vjp(objective, state.images)
        (gradients,) = pullback(jnp.ones_like(scores))
        size = step_size * schedule(step, number)
        now = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
        new = sampler.step(now, gradients, state, size, project)
        if target is None:
            return new
        going = (scores < target)[:, None, None, None]
        return jax.tree.map(lambda a, b: jnp.where(going, a, b), new, state)

    return jax.lax.fori_loop(0, number, advance, sampler.init(seeds)).images
