"""Image i of a set of samples, the same whatever the batch, devices and caller.

Compilers order sums by the shape of a batch: the same image drawn in batches of 10 and
of 64 differs in its last bits, and a long ascent makes that visible. Therefore every
program draws exactly `CHUNK` images on one device, however many are asked for. Several
devices draw different chunks side by side.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

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
# Beyond every image's index, so that the noise of steps is not that of the seeds.
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
    """Uniform noise in [0, 1], each image by its own index: [B, H, W, C] float32.

    Args:
      key: a typed PRNG key.
      indices: [B] int32; image i is the same in every batch that contains index i.
      image_shape: (H, W, C).
    """
    return jax.vmap(
        lambda index: jax.random.uniform(jax.random.fold_in(key, index), image_shape)
    )(indices)


_noise = jax.jit(noise_seeds, static_argnums=2)


def step_keys(seed: jax.Array, indices: jax.Array) -> jax.Array:
    """Keys [B] of the noise of the steps: of a recipe's seed, and indices [B]."""
    key = jax.random.fold_in(jax.random.key(seed), _STEPS)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


class ReadSeeds:
    """Seed i is image i of a data set, over and over: a `SeedsFn`.

    The next image that can be decoded stands in for one that cannot: never a black one.

    `stand_ins` are the indices, so far, whose seed stands in for another.
    """

    def __init__(self, source: data.Source, settings: ml_collections.ConfigDict):
        from atebm_jax import data  # its pipeline is slow to import

        self.stand_ins: set[int] = set()
        self._settings = settings
        self._images = data.Images(
            source, data.parse(settings.preprocess_seeds), tuple(settings.image_shape)
        )

    def __call__(self, indices: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Seeds [B, H, W, C] float32 in [0, 1].

        Raises:
          UserError: too many images in a row cannot be decoded.
        """
        del labels
        with ThreadPoolExecutor(max(self._settings.num_threads, 1)) as pool:
            levels = np.stack(list(pool.map(self._read, indices.tolist())))
        return levels.astype(np.float32) / np.float32(255)

    def _read(self, index: int) -> np.ndarray:
        place = index % len(self._images.source)
        (image, _), bad = self._images.first_good(
            place, np.random.default_rng, self._settings.max_bad_images
        )
        if bad == place:
            self.stand_ins.add(index)
        return image


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
      gaussian: what seeds are drawn from if `spec` is a kind of them.
      source: the images if `spec` is a data set, or those that take its place.
    """
    if source is not None:
        return ReadSeeds(source, settings)
    if spec == NOISE:
        key, shape = jax.random.key(seed), tuple(settings.image_shape)
        return lambda indices, labels: np.asarray(_noise(key, indices, shape))
    assert gaussian is not None
    return partial(gaussian.batch, seed)


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
