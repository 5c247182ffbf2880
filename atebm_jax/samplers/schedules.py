"""How the step size goes from the first step to the last."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

#: (step, from 0; number of steps), [] int32 each -> factor of the step size, [].
ScheduleFn = Callable[[jax.Array, jax.Array], jax.Array]


def _progress(step: jax.Array, num_steps: jax.Array) -> jax.Array:
    return step.astype(jnp.float32) / jnp.maximum(num_steps, 1).astype(jnp.float32)


#: "linear" and "cosine" fall from 1 towards 0, which would be the step after the last.
SCHEDULES: dict[str, ScheduleFn] = {
    "constant": lambda step, num_steps: jnp.float32(1.0),
    "linear": lambda step, num_steps: 1.0 - _progress(step, num_steps),
    "cosine": lambda step, num_steps: (
        0.5 + 0.5 * jnp.cos(jnp.pi * _progress(step, num_steps))
    ),
}
