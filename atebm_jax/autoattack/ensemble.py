"""The ensemble: attacks in their order, each on the images that still stand.

The work is cut into units, one batch in one round of an attack. A finished unit says
which of its images it fooled, and the state is nothing but the units done so far:
whoever stores them can stop at any time and go on later, to the same result.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atebm_jax.autoattack import checks
from atebm_jax.autoattack.apgd import ModelFn
from atebm_jax.autoattack.units import Batch, Programs, attack_function
from atebm_jax.autoattack.versions import Plan, Round, Threat, plan
from atebm_jax.errors import UserError

CLEAN = "clean"
# The last batch of a round is filled up to one of these parts of the batch size:
# less wasted work on copies, for at most this many programs an attack.
_PARTS = (1, 2, 4, 8)


class Unit(NamedTuple):
    """A finished unit of work.

    Attributes:
      attack: a key of `ATTACKS`, or "clean" for the first pass.
      number: of the round.
      indices: [n] int, the images it treated.
      fooled: [n] bool, which of them are misclassified now.
      images: [fooled, H, W, C] float32, the misclassified ones as they are then.
    """

    attack: str
    number: int
    indices: np.ndarray
    fooled: np.ndarray
    images: np.ndarray


class Progress(NamedTuple):
    """Where a run stands.

    Attributes:
      attack, number: round of the unit just done.
      round_index, num_rounds: its place among the rounds, from 0, and their number.
      done, of: images treated in the round, and in the whole round.
      robust: images that still stand.
    """

    attack: str
    number: int
    round_index: int
    num_rounds: int
    done: int
    of: int
    robust: int


@dataclasses.dataclass(frozen=True)
class Result:
    """What the ensemble found on N images.

    Attributes:
      norm, epsilon, version: what was asked for.
      clean: [N] bool, classified correctly without an attack.
      robust: by attack, in their order: [N] bool, still correct after this attack and
        all before it. Images misclassified from the start are not robust.
      adversarial: [N, H, W, C] float32 in [0, 1]: the image that was misclassified
        first, the image itself where no attack succeeded.
      notes: what is done otherwise than asked and what makes the figures doubtful,
        one sentence each.
      compile_seconds, run_seconds: of this call; earlier units of a run that goes on
        are not in it.
    """

    norm: str
    epsilon: float
    version: str
    clean: np.ndarray
    robust: dict[str, np.ndarray]
    adversarial: np.ndarray
    notes: tuple[str, ...]
    compile_seconds: float
    run_seconds: float

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
        return list(self.accuracies.values())[-1] if self.robust else 0.0


@dataclasses.dataclass
class _Count:
    """Which images stand, made from units in their order."""

    clean: np.ndarray
    robust: np.ndarray
    adversarial: np.ndarray

    def add(self, unit: Unit) -> None:
        lost = unit.indices[unit.fooled]
        self.robust[lost] = False
        if unit.attack == CLEAN:
            self.clean[lost] = False
        else:
            self.adversarial[lost] = unit.images


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
    sharding: jax.sharding.NamedSharding | None = None,
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
        `stochastic`, (images, key) -> logits.
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
    programs = Programs(logits_fn, stochastic, sharding)
    make_batch = _batcher(key, images, labels)
    num_classes = _num_classes(logits_fn, images, key, stochastic)
    if labels.max() >= num_classes:
        raise UserError(
            f"label {int(labels.max())} for a network of {num_classes} classes: labels "
            "are 0 to the number of classes less one."
        )
    plan_ = plan(version, threat, num_classes, names=attacks, settings=settings)
    count = _Count(
        np.ones(len(images), bool), np.ones(len(images), bool), images.copy()
    )
    sizes = _sizes(batch_size, sharding)
    earlier = iter(done)
    notes = list(plan_.notes)
    robust: dict[str, np.ndarray] = {}
    rounds = (Round(CLEAN, 0), *plan_.rounds)
    for place, round_ in enumerate(rounds):
        make = partial(_function, round_.attack, plan_)
        waiting = np.flatnonzero(count.robust)
        position = 0
        for indices, size in _batches(waiting, sizes):
            unit = _next_of(earlier, round_, indices)
            if unit is None:
                result = programs.call(
                    round_.attack, make, make_batch(indices, size, round_.number)
                )
                unit = _unit(round_, indices, *result)
                on_unit(unit)
            count.add(unit)
            position += len(indices)
            on_progress(
                Progress(
                    *round_,
                    place,
                    len(rounds),
                    position,
                    len(waiting),
                    int(count.robust.sum()),
                )
            )
        if round_.attack == CLEAN:
            notes += _probe(programs, make_batch, count, sizes[0], version, stochastic)
        else:
            robust[round_.attack] = count.robust.copy()
    if next(earlier, None) is not None:
        raise _other_run()
    notes += checks.after(robust)
    return Result(
        plan_.norm,
        plan_.epsilon,
        version,
        count.clean,
        robust or {"none": count.robust},
        count.adversarial,
        tuple(notes),
        programs.seconds.compile,
        programs.seconds.run,
    )


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
    logits_fn: Callable[..., jax.Array],
    images: np.ndarray,
    key: jax.Array,
    stochastic: bool,
) -> int:
    values = (jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32),)
    logits = jax.eval_shape(logits_fn, *values, *((key,) if stochastic else ()))
    if len(logits.shape) != 2:
        raise UserError(
            f"the network maps one image to shape {logits.shape}: expected logits [1, "
            "number of classes]."
        )
    return logits.shape[1]


def _sizes(
    batch_size: int, sharding: jax.sharding.NamedSharding | None
) -> tuple[int, ...]:
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


def _batcher(
    key: jax.Array, images: np.ndarray, labels: np.ndarray
) -> Callable[[np.ndarray, int, int], Batch]:
    def make(indices: np.ndarray, size: int, number: int) -> Batch:
        # Copies of the first image fill the batch; nobody looks at their results.
        padded = np.concatenate(
            [indices, np.full(size - len(indices), indices[0], indices.dtype)]
        )
        return Batch(
            images[padded],
            labels[padded],
            jnp.asarray(padded, jnp.int32),
            jnp.int32(number),
            key,
        )

    return make


def _function(name: str, plan_: Plan, model: ModelFn) -> Callable[[Batch], Any]:
    """What a round of this name computes; see `units.attack_function`."""
    if name != CLEAN:
        return attack_function(name, plan_, model)

    def classify(batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits = model(batch.images, jax.random.fold_in(batch.key, 1001))
        return batch.images, logits.argmax(axis=-1) != batch.labels

    return classify


def _unit(
    round_: Round, indices: np.ndarray, images: np.ndarray, fooled: np.ndarray
) -> Unit:
    fooled = fooled[: len(indices)]
    kept = images[: len(indices)][fooled]
    return Unit(*round_, indices, fooled, kept)


def _next_of(
    earlier: Iterator[Unit], round_: Round, indices: np.ndarray
) -> Unit | None:
    unit = next(earlier, None)
    if unit is None:
        return None
    if (unit.attack, unit.number) != tuple(round_) or not np.array_equal(
        unit.indices, indices
    ):
        raise _other_run()
    return unit


def _other_run() -> UserError:
    return UserError(
        "the earlier units are not of this run: images, attacks, batch size and "
        "version must be the same; start anew without them otherwise."
    )


def _probe(
    programs: Programs,
    make_batch: Callable[[np.ndarray, int, int], Batch],
    count: _Count,
    size: int,
    version: str,
    stochastic: bool,
) -> list[str]:
    """Warnings from the first images, correct ones if there are any."""
    indices = np.flatnonzero(count.clean)[:size]
    if not len(indices):
        return ["No image is classified correctly: there is nothing to attack."]
    seen = programs.call("probe", checks.probe, make_batch(indices, size, 0))
    return checks.before(seen, len(indices), version, stochastic)
