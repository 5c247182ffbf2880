"""The ensemble: attacks in their order, each on the images that still stand.

The work is cut into units, one batch in one round of an attack. A finished unit says
which of its images it fooled, and the state is nothing but the units done so far:
whoever stores them can stop at any time and go on later, to the same result.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial

from atebm_jax.autoattack import checks, programs
from atebm_jax.autoattack.programs import CLEAN, Batch, Program
from atebm_jax.autoattack.versions import Plan, Round, Threat, plan
from atebm_jax.errors import UserError

# The last batch of a round is filled up to one of these parts of the batch size:
# less wasted work on copies, for at most this many programs an attack.
_PARTS = (1, 2, 4, 8)
_OTHER_RUN = (
    "the earlier units are not of this run: images, attacks, batch size and version "
    "must be the same; start anew without them otherwise."
)


class Unit(NamedTuple):
    """A finished unit of work."""

    attack: str  #: a key of `ATTACKS`, or "clean" for the first pass
    number: int  #: of the round
    indices: np.ndarray  #: [n] int, the images that it treated
    fooled: np.ndarray  #: [n] bool, which of them are misclassified now
    images: np.ndarray  #: [fooled, H, W, C] float32, the misclassified ones, as now


class Progress(NamedTuple):
    """Where a run stands after a unit."""

    attack: str  #: of the unit's round
    number: int  #: of the unit's round
    round_index: int  #: its place among the rounds, from 0
    num_rounds: int
    done: int  #: images treated in the round
    of: int  #: images in the whole round
    robust: int  #: images that still stand


class Result(NamedTuple):
    """What the ensemble found on N images."""

    #: [N] bool, classified correctly without an attack.
    clean: np.ndarray
    #: By attack, in their order: [N] bool, still correct after this attack and all
    #: before it. Images misclassified from the start are not. "none" if no attack runs.
    robust: dict[str, np.ndarray]
    #: [N, H, W, C] float32 in [0, 1], the image that was misclassified first; the
    #: image itself where no attack succeeded.
    adversarial: np.ndarray
    #: What is done otherwise than asked and what makes the figures doubtful, one
    #: sentence each.
    notes: tuple[str, ...]

    @property
    def clean_accuracy(self) -> float:
        """Share of all images classified correctly without an attack."""
        return float(self.clean.mean())

    @property
    def accuracies(self) -> dict[str, float]:
        """Share of all images robust after each attack, in their order."""
        return {name: float(mask.mean()) for name, mask in self.robust.items()}

    @property
    def robust_accuracy(self) -> float:
        """Share of all images that withstood everything."""
        return list(self.accuracies.values())[-1]


def run(
    key: jax.Array,
    logits_fn: Callable[..., jax.Array],
    images: np.ndarray | jax.Array,
    labels: np.ndarray | jax.Array,
    *,
    threat: Threat,
    version: str = "standard",
    attacks: Sequence[str] | None = None,
    settings: dict[str, Any] | None = None,
    batch_size: int = 256,
    stochastic: bool = False,
    sharding: NamedSharding | None = None,
    done: Iterable[Unit] = (),
    on_unit: Callable[[Unit], None] = lambda unit: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Result:
    """Runs AutoAttack (Croce and Hein, 2020) on a classifier.

    Each attack sees only the images that all before it failed on, and an image counts
    as fooled when a pass of its own finds it misclassified. Random numbers depend on
    the key, the attack and the image's place, not on batches.

    Args:
      key: random key; same key, same result.
      logits_fn: images [B, H, W, C] float32 in [0, 1] -> logits [B, K], any B; with
        `stochastic`, (images, key) -> logits. Give a large network as
        `jax.tree_util.Partial(model.apply, variables)`: its weights are then arguments
        of the compiled programs instead of constants in each.
      images: [N, H, W, C] float in [0, 1].
      labels: [N] int in 0..K-1.
      threat: of `atebm_jax.attacks.threat`, or (norm, radius) with "linf", "l2", "l1".
      version: "standard", "plus", "rand" (for randomised networks) or "custom".
      attacks: names for "custom", in their order.
      settings: fields of `versions.Settings` to change, {"num_steps": 20}, say.
      batch_size: images at a time; rounded up to a multiple of the devices.
      stochastic: the network takes a key.
      sharding: how a batch's first axis is split over devices; default: one device.
        Several processes may share them: each calls this with the same arguments and
        receives the whole result.
      done: the units of an earlier run, in their order; they are not run again.
      on_unit: called with every new unit, before the next one begins. It may raise to
        stop.
      on_progress: called after every unit, also of `done`.

    Returns:
      Masks, adversarial images and notes.

    Raises:
      UserError: arguments that do not fit, or units of another run.
    """
    images, labels = _check_data(images, labels, batch_size)
    network = logits_fn if isinstance(logits_fn, Partial) else Partial(logits_fn)
    num_classes = _num_classes(network, images, labels, key if stochastic else None)
    plan_ = plan(version, threat, num_classes, names=attacks, settings=settings)
    task = _Task(*_everywhere(network, key, sharding), images, labels, plan_, sharding)
    sizes = _sizes(batch_size, sharding)
    standing, adversarial = np.ones(len(images), bool), images.copy()
    masks: dict[str, np.ndarray] = {}
    notes = list(plan_.notes)
    earlier = iter(done)
    rounds = (Round(CLEAN, 0), *plan_.rounds)
    for place, round_ in enumerate(rounds):
        waiting = np.flatnonzero(standing)
        position = 0
        for indices, size in _batches(waiting, sizes):
            unit = _next_of(earlier, round_, indices)
            if unit is None:
                unit = _compute(task, round_, indices, size, stochastic)
                on_unit(unit)
            lost = unit.indices[unit.fooled]
            standing[lost], adversarial[lost] = False, unit.images
            position += len(indices)
            counts = (position, len(waiting), int(standing.sum()))
            on_progress(Progress(*round_, place, len(rounds), *counts))
        masks[round_.attack] = standing.copy()
        if round_.attack == CLEAN:
            notes += _warnings(task, standing, sizes[0], version, stochastic)
    if next(earlier, None) is not None:
        raise UserError(_OTHER_RUN)
    clean = masks.pop(CLEAN)
    notes += checks.after(masks)
    return Result(clean, masks or {"none": clean}, adversarial, tuple(notes))


class _Task(NamedTuple):
    """What a run attacks: its arguments, checked and placed on the devices."""

    network: Partial
    key: jax.Array
    images: np.ndarray
    labels: np.ndarray
    plan: Plan
    sharding: NamedSharding | None


def _compute(
    task: _Task, round_: Round, indices: np.ndarray, size: int, stochastic: bool
) -> Unit:
    program = programs.planned(task.plan, round_.attack, stochastic)
    found = programs.attack(program, task.network, _batch(task, round_, indices, size))
    images, fooled = (_on_host(x)[: len(indices)] for x in found)
    return Unit(*round_, indices, fooled, images[fooled])


def _warnings(
    task: _Task, clean: np.ndarray, size: int, version: str, stochastic: bool
) -> list[str]:
    """What a look at the first images that are classified correctly tells."""
    indices = np.flatnonzero(clean)[:size]
    if not len(indices):
        return ["No image is classified correctly: there is nothing to attack."]
    batch = _batch(task, Round(CLEAN, 0), indices, size)
    seen = programs.probe(Program(stochastic), task.network, batch)
    seen = programs.Probe(*(_on_host(x)[: len(indices)] for x in seen))
    return checks.before(seen, version, stochastic)


def _check_data(
    images: np.ndarray | jax.Array, labels: np.ndarray | jax.Array, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim != 4 or not np.issubdtype(images.dtype, np.floating):
        raise UserError(
            f"images have shape {images.shape} and dtype {images.dtype}: expected "
            "[N, H, W, C] floats in [0, 1]; divide bytes by 255."
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"labels have shape {labels.shape} and dtype {labels.dtype}: expected "
            f"{len(images)} integers, one an image."
        )
    if not len(images) or labels.min() < 0:
        raise UserError("AutoAttack needs at least one image, and labels from 0 on.")
    if not (images.min() >= 0 and images.max() <= 1):
        raise UserError(
            f"images range from {images.min():.4g} to {images.max():.4g}: expected "
            "[0, 1]; normalisation belongs inside the network."
        )
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: it must be at least 1.")
    return images.astype(np.float32), labels.astype(np.int32)


def _num_classes(
    network: Partial, images: np.ndarray, labels: np.ndarray, key: jax.Array | None
) -> int:
    image = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
    logits = jax.eval_shape(network, image, *([] if key is None else [key]))
    if len(logits.shape) != 2:
        raise UserError(
            f"the network maps one image to shape {logits.shape}: expected logits [1, "
            "number of classes]."
        )
    if labels.max() >= logits.shape[1]:
        raise UserError(
            f"label {int(labels.max())} for a network of {logits.shape[1]} classes: "
            "labels are 0 to the number of classes less one."
        )
    return logits.shape[1]


def _sizes(batch_size: int, sharding: NamedSharding | None) -> tuple[int, ...]:
    """Batch sizes to compile for, largest first, each a multiple of the devices."""
    devices = 1 if sharding is None else len(sharding.device_set)
    sizes = {
        math.ceil(math.ceil(batch_size / part) / devices) * devices for part in _PARTS
    }
    return tuple(sorted(sizes, reverse=True))


def _batches(
    waiting: np.ndarray, sizes: Sequence[int]
) -> Iterator[tuple[np.ndarray, int]]:
    """Indices a batch, and the batch size to fill them up to."""
    for begin in range(0, len(waiting), sizes[0]):
        indices = waiting[begin : begin + sizes[0]]
        yield indices, min(size for size in sizes if size >= len(indices))


def _batch(task: _Task, round_: Round, indices: np.ndarray, size: int) -> Batch:
    def put(values: np.ndarray) -> Any:
        return values if task.sharding is None else _global(values, task.sharding)

    # Copies of the first image fill the batch; nobody looks at their results.
    padded = np.concatenate([indices, np.full(size - len(indices), indices[0])])
    epsilon: Any = np.float32(task.plan.epsilon)
    number: Any = np.int32(round_.number)
    return Batch(
        put(task.images[padded]),
        put(task.labels[padded]),
        put(padded.astype(np.int32)),
        epsilon,
        number,
        task.key,
    )


def _everywhere(
    network: Partial, key: jax.Array, sharding: NamedSharding | None
) -> tuple[Partial, jax.Array]:
    """Weights and key on every device."""
    if sharding is None:
        return network, key
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    data = _global(np.asarray(jax.random.key_data(key)), whole)
    key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
    return jax.device_put(network, whole), key


def _global(values: np.ndarray, sharding: NamedSharding) -> Any:
    """An array that all processes hold, of which each places its own parts."""
    return jax.make_array_from_callback(values.shape, sharding, lambda at: values[at])


def _on_host(array: jax.Array) -> np.ndarray:
    """The whole array in every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _next_of(
    earlier: Iterator[Unit], round_: Round, indices: np.ndarray
) -> Unit | None:
    unit = next(earlier, None)
    if unit is None:
        return None
    same_round = (unit.attack, unit.number) == tuple(round_)
    if not (same_round and np.array_equal(unit.indices, indices)):
        raise UserError(_OTHER_RUN)
    return unit
