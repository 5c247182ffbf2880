"""Samples by gradient ascent on the score of the model (paper, section 5)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from atebm_jax import attacks, energy
from atebm_jax.attacks import ObjectiveFn


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


def conditional(
    logits_fn: ObjectiveFn,
    seeds: jax.Array,
    labels: jax.Array,
    *,
    step_size: jax.Array | float,
    num_steps: jax.Array | int,
) -> jax.Array:
    """Samples of given classes: unbounded PGD on f(x)[y] = -E(x, y).

    Args:
      logits_fn: images [B, H, W, C] -> logits [B, K].
      seeds: [B, H, W, C] float in [0, 1].
      labels: [B] int in 0..K-1.
      step_size: L2 pixels per step.
      num_steps: number of steps; a traced int32 never recompiles.

    Returns:
      [B, H, W, C] images in [0, 1].
    """
    return attacks.pgd(
        lambda x: energy.score(logits_fn(x), labels),
        seeds,
        threat=attacks.unbounded(),
        step_size=step_size,
        num_steps=num_steps,
    )


def unconditional(
    logits_fn: ObjectiveFn,
    seeds: jax.Array,
    *,
    step_size: jax.Array | float,
    num_steps: jax.Array | int,
) -> jax.Array:
    """Samples of any class: unbounded PGD on logsumexp f(x) = -E(x).

    Arguments and result as of `conditional`, without labels.
    """
    return attacks.pgd(
        lambda x: energy.score(logits_fn(x)),
        seeds,
        threat=attacks.unbounded(),
        step_size=step_size,
        num_steps=num_steps,
    )


def counterfactual(
    logits_fn: ObjectiveFn,
    images: jax.Array,
    targets: jax.Array,
    *,
    threat: attacks.Threat,
    step_size: jax.Array | float,
    num_steps: jax.Array | int,
) -> jax.Array:
    """What images would look like as another class: PGD on f(x)[y'] in a ball.

    Args:
      logits_fn: images [B, H, W, C] -> logits [B, K].
      images: [B, H, W, C] float in [0, 1], the originals.
      targets: [B] int in 0..K-1, the classes y'.
      threat: the ball around each original, `attacks.l2(4.0)` say (paper, section 5).
      step_size: pixels of the threat's norm per step.
      num_steps: number of steps; a traced int32 never recompiles.

    Returns:
      [B, H, W, C] images in [0, 1], inside the ball.
    """
    return attacks.pgd(
        lambda x: energy.score(logits_fn(x), targets),
        images,
        threat=threat,
        step_size=step_size,
        num_steps=num_steps,
    )


def cyclic_labels(count: int, num_classes: int) -> jax.Array:
    """Labels 0..K-1 over and over, class balanced: [count] int32 (paper, section 5)."""
    return jnp.arange(count, dtype=jnp.int32) % num_classes
