"""Image i of a set of samples, the same whatever the batch, devices and caller.

The evaluation of a job, the commands and the Python interface all draw here.

Compilers order sums by the shape of a batch: the same image drawn in batches of 10 and
of 64 differs in its last bits, and a long ascent makes that visible. Here every program
draws exactly `CHUNK` images on one device, however many are asked for. Several devices
draw different chunks side by side.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from atebm_jax import ascent, energy, models, recipes
from atebm_jax.recipes import Recipe
from atebm_jax.seeds import NOISE, Gaussian

if TYPE_CHECKING:
    from atebm_jax import data

CHUNK = 32
# Beyond every image's index: the steps' noise is not that of a seed.
_STEPS = 2**31

#: Indices [CHUNK] int32 -> classes [CHUNK] int32.
LabelsFn = Callable[[np.ndarray], np.ndarray]
#: (indices [CHUNK], classes [CHUNK]) -> seeds [CHUNK, H, W, C] float32 in [0, 1].
SeedsFn = Callable[[np.ndarray, np.ndarray], np.ndarray]
#: (weights, images [S, CHUNK, H, W, C]) -> a tree of arrays; compiled with the loop.
ReadFn = Callable[[Any, jax.Array], Any]

#: (indices [CHUNK], a tree of numpy arrays, weights on the device that made them) ->
#: a tree of numpy arrays, of the same shapes every time.
FinishFn = Callable[[np.ndarray, Any, Any], Any]


# Labels and seeds by the index of an image.


def cyclic_labels(num_classes: int) -> LabelsFn:
    """Classes 0..K-1 over and over, class balanced (paper, section 5)."""
    return lambda indices: (indices % num_classes).astype(np.int32)


def noise_seeds(
    key: jax.Array, indices: jax.Array, image_shape: tuple[int, int, int]
) -> jax.Array:
    """Uniform noise in [0, 1], each image by its own index.

    Args:
      key: a typed PRNG key.
      indices: [B] int32; image i is the same in every batch that contains index i.
      image_shape: (H, W, C).

    Returns:
      [B, H, W, C] float32.
    """
    return jax.vmap(
        lambda index: jax.random.uniform(jax.random.fold_in(key, index), image_shape)
    )(indices)


_noise = jax.jit(noise_seeds, static_argnums=2)


def step_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
    """Keys [B] for rules with noise, each image's by its own index.

    Arguments as of `noise_seeds`, whose seeds have nothing to do with this noise.
    """
    steps_key = jax.random.fold_in(key, _STEPS)
    return jax.vmap(lambda index: jax.random.fold_in(steps_key, index))(indices)


class ReadSeeds:
    """Seed i is image i of a data set, over and over: a `SeedsFn`.

    The next image that can be decoded stands in for one that cannot: never a black one.

    Args:
      source: the images.
      settings: `config.data`.

    Attributes:
      stand_ins: indices whose seed stands in for another; grows.
    """

    def __init__(self, source: data.Source, settings: ml_collections.ConfigDict):
        from atebm_jax import data  # its pipeline is slow to import

        self.stand_ins: set[int] = set()
        self._length, self._threads = len(source), max(settings.num_threads, 1)
        self._images = data.Images(
            source, data.parse(settings.preprocess_seeds), tuple(settings.image_shape)
        )
        self._max_bad = settings.max_bad_images

    def __call__(self, indices: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Seeds [B, H, W, C] float32 in [0, 1].

        Raises:
          UserError: too many images in a row cannot be decoded.
        """
        del labels
        places = (indices % self._length).tolist()
        with ThreadPoolExecutor(self._threads) as pool:
            read = list(pool.map(self._first_good, places))
        for index, (_, own) in zip(indices.tolist(), read, strict=True):
            if not own:
                self.stand_ins.add(index)
        levels = np.stack([image for image, _ in read])
        return levels.astype(np.float32) / np.float32(255)

    def _first_good(self, place: int) -> tuple[np.ndarray, bool]:
        """The image of a place, or the next good one; whether it is its own."""
        make_rng = np.random.default_rng
        (image, _), bad = self._images.first_good(place, make_rng, self._max_bad)
        return image, bad != place


def stand_ins(seeds_of: SeedsFn) -> set[int]:
    """Indices of images that began at the seed of another one, so far."""
    return seeds_of.stand_ins if isinstance(seeds_of, ReadSeeds) else set()


def seeds_fn(
    spec: str,
    seed: int,
    settings: ml_collections.ConfigDict,
    *,
    gaussian: Gaussian | None = None,
    source: data.Source | None = None,
) -> SeedsFn:
    """Seeds as `config.data.seeds` has it.

    Args:
      spec: noise, a kind of Gaussians, or a data set.
      seed: of what is drawn; not of images that are read.
      settings: `config.data`.
      gaussian: what seeds are drawn from, where `spec` is a kind of them.
      source: the images, where `spec` is a data set, or those that take its place.
    """
    if source is not None:
        return ReadSeeds(source, settings)
    if spec == NOISE:
        key, shape = jax.random.key(seed), tuple(settings.image_shape)
        return lambda indices, labels: np.asarray(_noise(key, indices, shape))
    assert gaussian is not None
    return partial(gaussian.batch, seed)


# Chunks.


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
    """The first images of a set, in memory.

    Args:
      model, variables, recipe, labels_of, seeds_of, together: as of `draw`.
      number: how many.
      show: (chunks that are done, all of them), before the first and after each.

    Returns:
      [number, H, W, C] float32 in [0, 1].
    """
    chunks = num_chunks(number)
    show(0, chunks)
    made = []
    for index, drawn in draw(
        model,
        variables,
        recipe,
        range(chunks),
        labels_of,
        seeds_of,
        together=together,
    ):
        made.append(drawn)
        show(index + 1, chunks)
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
      model: images to logits.
      variables: its weights.
      recipe: one that has been checked.
      numbers: of the chunks to draw; chunk n holds images n * CHUNK and on.
      labels_of: of images by their indices; ignored where the recipe is not
        conditional.
      seeds_of: of images by their indices and classes.
      ends: numbers of steps at which images are read, ascending, instead of the
        recipe's alone: S of them, of one trajectory.
      read: what is kept of images, instead of the last of them.
      read_weights: what `read` is given first.
      finish: (indices [CHUNK], what was read as numpy, (variables, read_weights) on
        the device that made it) -> what is yielded.
      together: every process of a job draws, each a share of the chunks, and has all.

    Yields:
      (number, images [CHUNK, H, W, C] float32 in [0, 1], or what `finish` makes of what
      `read` makes of them), in the order of `numbers`.
    """
    steps = [recipe.num_steps] if ends is None else list(ends)
    program = _program(model, _static(recipe), len(steps), read)
    stop = recipe.target_energy
    traced = _Traced(
        np.uint32(recipe.seed),
        np.float32(recipe.step_size),
        np.asarray(steps, np.int32),
        None if stop is None else np.float32(-stop),
    )

    def arguments_of(indices: np.ndarray) -> tuple[Any, ...]:
        labels = labels_of(indices)
        return traced, indices, labels, seeds_of(indices, labels)

    weights = (variables, read_weights)
    return on_devices(
        program, weights, numbers, arguments_of, finish=finish, together=together
    )


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
      weights: of the networks.
      numbers: of the chunks.
      arguments_of: indices [CHUNK] int32 -> trees of arrays, the same shapes every
        time.
      finish, together: as of `draw`. Alone, a process uses its own devices.

    Yields:
      (number, what the program or `finish` returned, as numpy), in the order of
      `numbers`.
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


class _Traced(NamedTuple):
    """What may change without another compilation; ends [S], the rest [].

    The target is None for never.
    """

    seed: Any
    step_size: Any
    ends: Any
    target: Any


def _static(recipe: Recipe) -> Recipe:
    """The recipe with all that is traced set to one value."""
    return recipe._replace(seed=0, step_size=1.0, num_steps=0, target_energy=None)


@lru_cache
def _program(
    model: nn.Module, recipe: Recipe, num_ends: int, read: ReadFn | None
) -> Callable[..., Any]:
    rule = ascent.rule(recipe.sampler)

    def sample(
        weights: Any,
        traced: _Traced,
        indices: jax.Array,
        labels: jax.Array,
        seeds: jax.Array,
    ) -> Any:
        variables, read_weights = weights
        keys = step_keys(jax.random.key(traced.seed), indices)
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
            step_size=traced.step_size,
            ends=traced.ends,
            schedule=ascent.SCHEDULES[recipe.schedule],
            target=traced.target,
        )
        return images[-1] if read is None else read(read_weights, images)

    del num_ends  # the shape of the ends; a program each
    return jax.jit(sample)
