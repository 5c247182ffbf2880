"""Samples in chunks of one size, so that each depends on its number alone.

Compilers order sums by the shape of a batch: the same image drawn in batches of 10 and
of 64 differs in its last bits, and a long ascent makes that visible. Here every program
draws exactly `CHUNK` images on one device, however many are asked for; several devices
draw different chunks side by side.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from atebm_jax import ascent, energy, models, sampling
from atebm_jax.errors import UserError

CHUNK = 32
# The blur is written out, a sum of 6 sigma + 1 images along each axis.
_WIDEST_BLUR = 64
_LARGEST = float(np.finfo(np.float32).max)


class Recipe(NamedTuple):
    """How samples are drawn; everything that decides them beside model and seeds.

    Attributes:
      sampler: as of `ascent.rule`; with all settings in a protocol.
      schedule: a key of `ascent.SCHEDULES`.
      step_size: > 0, as of the sampler; L2 pixels per step but for "sgld".
      num_steps: >= 0.
      target_energy: an image stops where its energy is this or lower; None for never.
      smooth: standard deviation of a Gaussian blur of the seeds, pixels, 0 to 64.
      seed: of noise, 0 <= seed < 2**32.
      conditional: draw given classes, by E(x, y), or any, by E(x).
    """

    sampler: str = "pgd"
    schedule: str = "constant"
    step_size: float = 0.2
    num_steps: int = 35
    target_energy: float | None = None
    smooth: float = 0.0
    seed: int = 0
    conditional: bool = True


def check(recipe: Recipe) -> None:
    """Refuses values that nothing can be drawn with.

    Raises:
      UserError: names the value, what is allowed and the remedy.
    """
    ascent.rule(recipe.sampler)
    if recipe.schedule not in ascent.SCHEDULES:
        raise UserError(
            f"unknown schedule {recipe.schedule!r}: choose one of "
            f"{', '.join(ascent.SCHEDULES)}."
        )
    number, whole = (int, float, np.number), (int, np.integer)
    size, steps = recipe.step_size, recipe.num_steps
    if not isinstance(size, number) or not isinstance(steps, whole):
        raise UserError(
            f"num_steps is {steps!r} and step_size {size!r}: expected a whole "
            "number and a number."
        )
    if steps < 0 or not 0 < size <= _LARGEST:
        raise UserError(
            f"num_steps is {steps} and step_size {size}: the steps must not "
            "be negative, their size is positive and finite in float32."
        )
    if steps >= 2**31:
        raise UserError(f"num_steps is {steps}: it must be below 2**31.")
    check_seed(recipe.seed)
    smooth, target = recipe.smooth, recipe.target_energy
    if not isinstance(smooth, number) or not 0 <= smooth <= _WIDEST_BLUR:
        raise UserError(f"smooth is {smooth!r}: expected 0 to {_WIDEST_BLUR} pixels.")
    if target is not None and not (isinstance(target, number) and np.isfinite(target)):
        raise UserError(f"target_energy is {target!r}: expected a finite number.")


def check_seed(seed: int) -> None:
    """Refuses a seed that no random key can be made of.

    Raises:
      UserError: names the allowed ones.
    """
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise UserError(
            f"seed is {seed!r}: expected a whole number from 0 to 2**32 - 1."
        )


def draw(
    model: nn.Module,
    variables: Any,
    recipe: Recipe,
    image_shape: tuple[int, int, int],
    numbers: Iterable[int],
    labels_of: Callable[[np.ndarray], np.ndarray],
    seeds_of: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Draws chunks of samples on all devices of this process.

    Args:
      model: images to logits.
      variables: its weights.
      recipe: as of `check`.
      image_shape: (H, W, C).
      numbers: of the chunks to draw; chunk n holds images n * CHUNK and on.
      labels_of: indices [CHUNK] -> classes [CHUNK] int32; ignored where the recipe is
        not conditional.
      seeds_of: indices [CHUNK] -> seeds [CHUNK, H, W, C] float32 in [0, 1]; None for
        uniform noise.

    Yields:
      (number, images [CHUNK, H, W, C] float32 in [0, 1]), in the order of `numbers`.
    """
    program = _program(model, _static(recipe), image_shape, seeds_of is not None)
    traced = _traced(recipe)

    def arguments_of(indices: np.ndarray) -> tuple[Any, ...]:
        seeds = () if seeds_of is None else (seeds_of(indices),)
        return traced, indices, labels_of(indices), *seeds

    return on_devices(program, variables, numbers, arguments_of)


def on_devices(
    program: Callable[..., Any],
    variables: Any,
    numbers: Iterable[int],
    arguments_of: Callable[[np.ndarray], tuple[Any, ...]],
) -> Iterator[tuple[int, Any]]:
    """Runs a program on chunk after chunk, side by side on all devices of this process.

    Args:
      program: compiled; (variables, *arguments) -> a tree of arrays.
      variables: the network's weights.
      numbers: of the chunks.
      arguments_of: indices [CHUNK] int32 -> trees of arrays, the same shapes every
        time.

    Yields:
      (number, what the program returned, as numpy), in the order of `numbers`.
    """
    devices = jax.local_devices()
    weights = [jax.device_put(variables, device) for device in devices]
    waiting: collections.deque[tuple[int, Any]] = collections.deque()
    for position, number in enumerate(numbers):
        place = position % len(devices)
        indices = np.arange(number * CHUNK, (number + 1) * CHUNK, dtype=np.int32)
        arguments = jax.device_put(arguments_of(indices), devices[place])
        waiting.append((number, program(weights[place], *arguments)))
        if len(waiting) > len(devices):
            done, made = waiting.popleft()
            yield done, jax.tree.map(np.asarray, made)
    for done, made in waiting:
        yield done, jax.tree.map(np.asarray, made)


class _Traced(NamedTuple):
    """What may change without another compilation; each [], target None for never."""

    seed: jax.Array
    step_size: jax.Array
    num_steps: jax.Array
    target: jax.Array | None


def _traced(recipe: Recipe) -> _Traced:
    energy_at_stop = recipe.target_energy
    return _Traced(
        jnp.uint32(recipe.seed),
        jnp.float32(recipe.step_size),
        jnp.int32(recipe.num_steps),
        None if energy_at_stop is None else jnp.float32(-energy_at_stop),
    )


def _static(recipe: Recipe) -> Recipe:
    """The recipe with all that is traced set to one value."""
    return recipe._replace(seed=0, step_size=1.0, num_steps=0, target_energy=None)


@lru_cache
def _program(
    model: nn.Module, recipe: Recipe, image_shape: tuple[int, int, int], given: bool
) -> Callable[..., jax.Array]:
    def sample(
        variables: Any,
        traced: _Traced,
        indices: jax.Array,
        labels: jax.Array,
        *seeds: jax.Array,
    ) -> jax.Array:
        key = jax.random.key(traced.seed)
        start = seeds[0] if given else sampling.noise_seeds(key, indices, image_shape)
        if recipe.smooth:
            start = sampling.smooth(start, recipe.smooth)
        logits_fn = models.logits_fn(model, variables)

        def objective(x: jax.Array) -> jax.Array:
            logits = logits_fn(x)
            return energy.score(logits, labels if recipe.conditional else None)

        return ascent.climb(
            objective,
            start,
            ascent.rule(recipe.sampler),
            keys=sampling.step_keys(key, indices),
            step_size=traced.step_size,
            num_steps=traced.num_steps,
            schedule=ascent.SCHEDULES[recipe.schedule],
            target=traced.target,
        )

    return jax.jit(sample)
