"""Image i of a set of samples, the same whatever the batch, devices and caller.

Compilers order sums by the shape of a batch: the same image drawn in batches of 10 and
of 64 differs in its last bits, and a long ascent makes that visible. Therefore every
program draws exactly `CHUNK` images on one device, however many are asked for. Several
devices draw different chunks side by side.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils

from atebm_jax import ascent, energy, models, recipes
from atebm_jax.recipes import Recipe
from atebm_jax.seeds import SeedsFn

CHUNK = 32
# Beyond every image's index, so that the noise of steps is not that of the seeds.
_STEPS = 2**31

#: Indices [CHUNK] int32 -> classes [CHUNK] int32.
LabelsFn = Callable[[np.ndarray], np.ndarray]
#: (weights, images [S, CHUNK, H, W, C]) -> a tree of arrays; compiled with the loop.
ReadFn = Callable[[Any, jax.Array], Any]
#: (indices [CHUNK], a tree of numpy arrays, weights on the device that made them) ->
#: a tree of numpy arrays, of the same shapes every time.
FinishFn = Callable[[np.ndarray, Any, Any], Any]


def cyclic_labels(num_classes: int) -> LabelsFn:
    """Classes 0..K-1 over and over, class balanced (paper, section 5)."""
    return lambda indices: (indices % num_classes).astype(np.int32)


def step_keys(seed: jax.Array, indices: jax.Array) -> jax.Array:
    """Keys [B] of the noise of the steps: of a recipe's seed, and indices [B]."""
    key = jax.random.fold_in(jax.random.key(seed), _STEPS)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


def images(
    model: nn.Module,
    variables: Any,
    recipe: Recipe,
    number: int,
    labels_of: LabelsFn,
    seeds_of: SeedsFn,
    *,
    together: bool = False,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """The first `number` images of a set, in memory; other arguments as of `draw`.

    Args:
      show: (chunks that are done, all of them), before the first and after each.

    Returns:
      [number, H, W, C] float32 in [0, 1].
    """
    numbers = range(num_chunks(number))
    arguments = (model, variables, recipe, numbers, labels_of, seeds_of)
    show(0, len(numbers))
    made = []
    for index, drawn in draw(*arguments, together=together):
        made.append(drawn)
        show(index + 1, len(numbers))
    return np.concatenate(made)[:number]


def num_chunks(number: int) -> int:
    """Chunks of so many images; the last one is filled up."""
    return -(-number // CHUNK)


def draw(
    model: nn.Module,
    variables: Any,
    recipe: Recipe,
    numbers: Iterable[int],
    labels_of: LabelsFn,
    seeds_of: SeedsFn,
    *,
    ends: Sequence[int] | None = None,
    read: ReadFn | None = None,
    read_weights: Any = None,
    finish: FinishFn | None = None,
    together: bool = False,
) -> Iterator[tuple[int, Any]]:
    """Draws chunks of samples.

    Args:
      model, variables: images to logits, and its weights.
      recipe: one that has been checked.
      numbers: of the chunks to draw; chunk n holds images n * CHUNK and on.
      labels_of: of images by their indices; ignored if the recipe is not conditional.
      seeds_of: of images by their indices and classes.
      ends: S ascending numbers of steps, at which images of one trajectory are read;
        default the recipe's alone.
      read, read_weights: what is kept of images, and its weights; default the last.
      finish: what is yielded; its weights are (variables, read_weights).
      together: each process of a job draws a share of the chunks, and gets all.

    Yields:
      (number, images [CHUNK, H, W, C] float32 in [0, 1], or what `finish` makes of what
      `read` makes of them), in the order of `numbers`.
    """
    static, traced = parts_of(recipe, ends)

    def arguments_of(indices: np.ndarray) -> tuple[Any, ...]:
        labels = labels_of(indices)
        return traced, indices, labels, seeds_of(indices, labels)

    return on_devices(
        chunk_program(model, static, read),
        (variables, read_weights),
        numbers,
        arguments_of,
        finish=finish,
        together=together,
    )


def parts_of(
    recipe: Recipe, ends: Sequence[int] | None = None
) -> tuple[Recipe, tuple[Any, ...]]:
    """What a recipe compiles, and what may change without another compilation."""
    traced = (
        np.uint32(recipe.seed),
        np.float32(recipe.step_size),
        np.asarray([recipe.num_steps] if ends is None else ends, np.int32),
        None if recipe.target_energy is None else np.float32(-recipe.target_energy),
    )
    static = recipe._replace(seed=0, step_size=1.0, num_steps=0, target_energy=None)
    return static, traced


def on_devices(
    program: Callable[..., Any],
    weights: Any,
    numbers: Iterable[int],
    arguments_of: Callable[[np.ndarray], tuple[Any, ...]],
    *,
    finish: FinishFn | None = None,
    together: bool = False,
) -> Iterator[tuple[int, Any]]:
    """Runs a program on chunk after chunk, side by side on all devices.

    Args:
      program: compiled; (weights, *arguments) -> a tree of arrays.
      weights, numbers: of the networks, and of the chunks.
      arguments_of: indices [CHUNK] int32 -> arguments, the same shapes every time.
      finish, together: as of `draw`.

    Yields:
      (number, what the program or `finish` returned, as numpy), as of `draw`.
    """
    devices = jax.local_devices()
    placed = [_put(weights, device) for device in devices]
    processes = jax.process_count() if together else 1
    first = jax.process_index() * len(devices) if together else 0

    def begin(round_: Sequence[int]) -> list[Any]:
        begun = []
        for number, device, own in zip(round_[first:], devices, placed):
            indices = np.arange(number * CHUNK, (number + 1) * CHUNK, dtype=np.int32)
            arguments = jax.device_put(arguments_of(indices), device)
            begun.append((indices, program(own, *arguments), own))
        return begun

    def end(round_: Sequence[int], begun: list[Any]) -> Iterator[tuple[int, Any]]:
        made = []
        for indices, found, own in begun:
            arrays = jax.tree.map(np.asarray, found)
            made.append(finish(indices, arrays, own) if finish else arrays)
        yield from zip(round_, made if processes == 1 else _exchanged(made))

    rest = iter(numbers)
    waiting: collections.deque[tuple[list[int], list[Any]]] = collections.deque()
    while round_ := list(itertools.islice(rest, processes * len(devices))):
        # Every process has as much to exchange: the last chunk stands in.
        missing = processes * len(devices) - len(round_) if processes > 1 else 0
        waiting.append((round_, begin(round_ + missing * round_[-1:])))
        # Devices compute a round while the one before is read.
        if len(waiting) > 1:
            yield from end(*waiting.popleft())
    for last in waiting:
        yield from end(*last)


def _put(weights: Any, device: jax.Device) -> Any:
    """Weights on one device; those of a job of several processes lie on all."""

    def here(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf.addressable_data(0)
        return leaf

    return jax.device_put(jax.tree.map(here, weights), device)


def _exchanged(made: Sequence[Any]) -> list[Any]:
    """What all processes made, one after the other; called by all together."""
    mine = jax.tree.map(lambda *arrays: np.stack(arrays), *made)
    everyone = multihost_utils.process_allgather(mine)
    whole = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), everyone)
    number = len(made) * jax.process_count()
    return [jax.tree.map(lambda x: x[k], whole) for k in range(number)]  # noqa: B023


@lru_cache
def chunk_program(
    model: nn.Module, recipe: Recipe, read: ReadFn | None
) -> Callable[..., Any]:
    """Draws one chunk; of the recipe what is not traced."""
    rule = ascent.rule(recipe.sampler)

    def sample(
        weights: Any,
        traced: tuple[Any, ...],
        indices: jax.Array,
        labels: jax.Array,
        seeds: jax.Array,
    ) -> Any:
        variables, read_weights = weights
        seed, step_size, ends, target = traced
        keys = step_keys(seed, indices)
        start = recipes.smooth(seeds, recipe.smooth) if recipe.smooth else seeds
        logits_fn = models.freeze(model, variables, seeds.shape[1:])

        def objective(x: jax.Array) -> jax.Array:
            return energy.score(logits_fn(x), labels if recipe.conditional else None)

        # One trajectory passes through every end.
        images = ascent.climb_through(
            objective,
            start,
            rule,
            keys=keys,
            step_size=step_size,
            ends=ends,
            schedule=ascent.SCHEDULES[recipe.schedule],
            target=target,
        )
        return images[-1] if read is None else read(read_weights, images)

    return jax.jit(sample)
