"""Seeds and labels of samples, and edits of images (paper, section 5)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atebm_jax import ascent, energy
from atebm_jax.constraints import Constraint
from atebm_jax.models import LogitsFn

# A label for `edit`: the class that the model predicts at the start.
GUESS = -1
# Beyond every image's index, so that the noise of steps is not that of seeds.
_STEPS = 2**31


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


def step_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
    """Keys [B] for rules with noise, each image's by its own index.

    Arguments as of `noise_seeds`. The noise is independent of those seeds.
    """
    steps_key = jax.random.fold_in(key, _STEPS)
    return jax.vmap(lambda index: jax.random.fold_in(steps_key, index))(indices)


def smooth(images: jax.Array, sigma: float) -> jax.Array:
    """Blurs seeds by a Gaussian; edges are continued by their last pixel.

    Args:
      images: [B, H, W, C] float32.
      sigma: standard deviation > 0, pixels.

    Returns:
      [B, H, W, C], as bright as before.
    """
    reach = max(math.ceil(3 * sigma), 1)
    weights = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / sigma))
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (1, 2):
        width = [(reach, reach) if a == axis else (0, 0) for a in range(4)]
        padded = jnp.pad(images, width, mode="edge")
        size = images.shape[axis]
        shifted = [
            weight * jax.lax.slice_in_dim(padded, k, k + size, axis=axis)
            for k, weight in enumerate(weights)
        ]
        images = sum(shifted[1:], start=shifted[0])
    return images


def counterfactual_step_size(step_size: Any, radius: Any) -> Any:
    """Five steps or more from the centre to the edge of a ball: min(step, radius / 5).

    Args:
      step_size: that of free samples, pixels of the ball's norm; a number or an array.
      radius: of the ball, pixels of its norm; a number or an array.

    Returns:
      The smaller one, pixels; of the shape that both broadcast to.
    """
    return np.minimum(step_size, radius / 5)


class Path(NamedTuple):
    """Readings of the model along the way of images, [T + 1, B] arrays.

    Batched functions return them as NumPy arrays [N, T + 1].
    """

    energy: Any  #: the one that is lowered: E(x, target), or E(x) without targets
    target_confidence: Any  #: p(target | x)
    original_confidence: Any  #: p(original | x)
    predicted: Any  #: the likeliest class, int32


class Edited(NamedTuple):
    """Edited images."""

    images: Any  #: [B, H, W, C] in [0, 1], in the constraint's set
    start: Any  #: [B, H, W, C], where they began
    targets: Any  #: [B] int32, the classes asked for; the originals if none was
    originals: Any  #: [B] int32, the classes that the model predicts at the start
    path: Path  #: readings before each step and at the end


def edit(
    logits_fn: LogitsFn,
    constraint: Constraint,
    labels: jax.Array | None,
    keys: jax.Array,
    *,
    rule: ascent.Rule,
    step_size: jax.Array | float,
    num_steps: jax.Array | int,
    capacity: int,
    schedule: ascent.ScheduleFn = ascent.SCHEDULES["constant"],
) -> Edited:
    """Lowers the energy from `constraint.start` within the constraint's set.

    A pure function that jits, vmaps over trees of constraints, and needs no
    communication where the images are split over devices.

    Args:
      logits_fn: images [B, H, W, C] -> logits [B, K].
      constraint: of B images, one of `constraints`.
      labels: [B] int32 in 0..K-1, or `GUESS`; None to lower E(x).
      keys: [B], for rules with noise.
      rule: `ascent.pgd()` say, or `ascent.sign()` in a ball of the maximum norm.
      step_size: as of the rule; one for all or [B, 1, 1, 1].
      num_steps: a traced int32 never recompiles.
      capacity: greatest number of steps, static; the path has capacity + 1 rows.
      schedule: factor of the step size in each step.

    Returns:
      Images, start, classes and path, each of B images; rows of the path beyond
      `num_steps` are zero.
    """
    start = constraint.start
    originals = jnp.argmax(logits_fn(start), axis=-1).astype(jnp.int32)
    targets = originals
    if labels is not None:
        targets = jnp.where(labels == GUESS, originals, labels)

    def confidence(logits: jax.Array, classes: jax.Array) -> jax.Array:
        probabilities = energy.class_probabilities(logits)
        return jnp.take_along_axis(probabilities, classes[:, None], axis=-1)[:, 0]

    def objective(x: jax.Array) -> tuple[jax.Array, Path]:
        logits = logits_fn(x)
        score = energy.score(logits, None if labels is None else targets)
        lowered = (
            energy.marginal(logits) if labels is None else energy.joint(logits, targets)
        )
        readings = Path(
            lowered,
            confidence(logits, targets),
            confidence(logits, originals),
            jnp.argmax(logits, axis=-1).astype(jnp.int32),
        )
        return score, readings

    images, path = ascent.trace(
        objective,
        start,
        rule,
        capacity=capacity,
        keys=keys,
        step_size=step_size,
        num_steps=num_steps,
        schedule=schedule,
        project=constraint.project,
    )
    return Edited(images, start, targets, originals, path)


def cyclic_labels(count: int, num_classes: int) -> jax.Array:
    """Labels 0..K-1 over and over, class balanced: [count] int32 (paper, section 5)."""
    return jnp.arange(count, dtype=jnp.int32) % num_classes
