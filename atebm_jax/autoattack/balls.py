"""Balls of the three norms: random starts, projections and lengths.

As in the attacks' papers and unlike `atebm_jax.attacks`, random starts lie on the
surface of the ball and a projection onto the L2 ball has its own rounding offset.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

_OFFSET = 1e-12
# Halvings of the interval in which the threshold of the L1 projection lies; the
# exact value then follows from the pixels on the linear piece that is left.
_HALVINGS = 30


def per_image(values: jax.Array) -> jax.Array:
    """[B] -> [B, 1, 1, 1], to go with images."""
    return values[:, None, None, None]


def l1_length(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B]."""
    return jnp.abs(x).sum(axis=(1, 2, 3))


def l2_length(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B]."""
    return jnp.sqrt(jnp.square(x).sum(axis=(1, 2, 3)))


def linf_length(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B]."""
    return jnp.abs(x).max(axis=(1, 2, 3))


LENGTHS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linf": linf_length,
    "l2": l2_length,
    "l1": l1_length,
}


def scaled_to(x: jax.Array, length: jax.Array, norm: str) -> jax.Array:
    """x with its direction kept and another length: [B, H, W, C], [B] or []."""
    lengths = LENGTHS[norm](x) + _OFFSET
    return x * per_image(jnp.broadcast_to(length, lengths.shape) / lengths)


def onto(images: jax.Array, origin: jax.Array, epsilon: jax.Array, norm: str):
    """Projects images onto the ball around the origin, then clips to [0, 1].

    For L1 the projection is the exact one onto the intersection of both (Croce and
    Hein, 2021).

    Args:
      images, origin: [B, H, W, C] float; the origin in [0, 1].
      epsilon: [] float >= 0.
      norm: a key of `LENGTHS`.

    Returns:
      [B, H, W, C] images in [0, 1].
    """
    return _ONTO[norm](images, origin, epsilon)


def _onto_linf(images: jax.Array, origin: jax.Array, epsilon: jax.Array) -> jax.Array:
    return jnp.clip(jnp.clip(images, origin - epsilon, origin + epsilon), 0.0, 1.0)


def _onto_l2(images: jax.Array, origin: jax.Array, epsilon: jax.Array) -> jax.Array:
    delta = images - origin
    length = l2_length(delta)
    scale = jnp.minimum(length, epsilon) / (length + _OFFSET)
    return jnp.clip(origin + delta * per_image(scale), 0.0, 1.0)


def _onto_l1(images: jax.Array, origin: jax.Array, epsilon: jax.Array) -> jax.Array:
    """min(max(|d| - t, 0), room) sign(d) per pixel, t >= 0 the least that fits."""
    delta = images - origin
    size = jnp.abs(delta)
    room = jnp.where(delta > 0, 1.0 - origin, origin)

    def shrunk(threshold: jax.Array) -> jax.Array:
        return jnp.clip(size - per_image(threshold), 0.0, room)

    def halve(_: int, interval: tuple[jax.Array, jax.Array]):
        low, high = interval
        middle = 0.5 * (low + high)
        too_long = shrunk(middle).sum(axis=(1, 2, 3)) > epsilon
        return jnp.where(too_long, middle, low), jnp.where(too_long, high, middle)

    interval = (jnp.zeros_like(size[:, 0, 0, 0]), linf_length(delta))
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, interval)
    middle = per_image(0.5 * (low + high))
    moving = (size > middle) & (size - middle < room)
    excess = shrunk(high).sum(axis=(1, 2, 3)) - epsilon
    count = jnp.maximum(moving.sum(axis=(1, 2, 3)), 1).astype(size.dtype)
    threshold = jnp.clip(high + excess / count, low, high)
    inside = shrunk(jnp.zeros_like(low)).sum(axis=(1, 2, 3)) <= epsilon
    threshold = jnp.where(inside, 0.0, threshold)
    return jnp.clip(origin + jnp.sign(delta) * shrunk(threshold), 0.0, 1.0)


_ONTO = {"linf": _onto_linf, "l2": _onto_l2, "l1": _onto_l1}


def noise(keys: jax.Array, shape: tuple[int, ...], norm: str) -> jax.Array:
    """A direction an image: uniform in the cube for Linf, Gaussian otherwise.

    Args:
      keys: [B] one key an image, so that an image's noise is its own.
      shape: (H, W, C).
      norm: a key of `LENGTHS`.

    Returns:
      [B, H, W, C] float32.
    """
    if norm == "linf":
        return jax.vmap(lambda k: jax.random.uniform(k, shape, minval=-1.0))(keys)
    return jax.vmap(lambda k: jax.random.normal(k, shape))(keys)


def random_start(
    keys: jax.Array, images: jax.Array, epsilon: jax.Array, norm: str
) -> jax.Array:
    """A start as far away as the ball allows, then clipped to [0, 1].

    Args:
      keys: [B] one key an image.
      images: [B, H, W, C] float in [0, 1].
      epsilon: [] float >= 0.
      norm: a key of `LENGTHS`.

    Returns:
      [B, H, W, C]; for L1 the projection of Gaussian noise.
    """
    direction = noise(keys, images.shape[1:], norm)
    if norm == "l1":
        return onto(images + direction, images, epsilon, norm)
    return jnp.clip(images + scaled_to(direction, epsilon, norm), 0.0, 1.0)


def image_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
    """One key an image, by its place in the data set: [], [B] int -> [B]."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


def num_pixels(images: jax.Array) -> int:
    """H * W * C."""
    return math.prod(images.shape[1:])
