"""Balls of the three norms: random starts, projections and lengths.

These follow the attacks' papers and differ from `atebm_jax.attacks`: random starts lie
on the surface of the ball, and the projection onto the L2 ball has a rounding offset of
its own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

_PIXELS = (1, 2, 3)
_OFFSET = 1e-12
# Halvings of the interval that holds the threshold of the L1 projection. The pixels on
# the linear piece that is left then give the exact value.
_HALVINGS = 30


def per_image(values: jax.Array) -> jax.Array:
    """[B] -> [B, 1, 1, 1], to go with images."""
    return values[:, None, None, None]


# [B, H, W, C] -> [B].
LENGTHS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linf": lambda x: jnp.abs(x).max(axis=_PIXELS),
    "l2": lambda x: jnp.sqrt(jnp.square(x).sum(axis=_PIXELS)),
    "l1": lambda x: jnp.abs(x).sum(axis=_PIXELS),
}


def scaled_to(x: jax.Array, length: jax.Array, norm: str) -> jax.Array:
    """x with its direction kept and another length: [B, H, W, C], [B] or []."""
    lengths = LENGTHS[norm](x) + _OFFSET
    return x * per_image(jnp.broadcast_to(length, lengths.shape) / lengths)


def onto(
    images: jax.Array, origin: jax.Array, epsilon: jax.Array, norm: str
) -> jax.Array:
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
    length = LENGTHS["l2"](delta)
    scale = jnp.minimum(length, epsilon) / (length + _OFFSET)
    return jnp.clip(origin + delta * per_image(scale), 0.0, 1.0)


def _onto_l1(images: jax.Array, origin: jax.Array, epsilon: jax.Array) -> jax.Array:
    """min(max(|d| - t, 0), room) sign(d) per pixel, t >= 0 the least that fits."""
    delta = images - origin
    size = jnp.abs(delta)
    room = jnp.where(delta > 0, 1.0 - origin, origin)

    def shrunk(threshold: jax.Array) -> jax.Array:
        return jnp.clip(size - per_image(threshold), 0.0, room)

    def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple:
        low, high = interval
        middle = 0.5 * (low + high)
        too_long = shrunk(middle).sum(axis=_PIXELS) > epsilon
        return jnp.where(too_long, middle, low), jnp.where(too_long, high, middle)

    interval = (jnp.zeros_like(size[:, 0, 0, 0]), LENGTHS["linf"](delta))
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, interval)
    middle = per_image(0.5 * (low + high))
    moving = (size > middle) & (size - middle < room)
    excess = shrunk(high).sum(axis=_PIXELS) - epsilon
    count = jnp.maximum(moving.sum(axis=_PIXELS), 1).astype(size.dtype)
    threshold = jnp.clip(high + excess / count, low, high)
    inside = shrunk(jnp.zeros_like(low)).sum(axis=_PIXELS) <= epsilon
    threshold = jnp.where(inside, 0.0, threshold)
    return jnp.clip(origin + jnp.sign(delta) * shrunk(threshold), 0.0, 1.0)


_ONTO = {"linf": _onto_linf, "l2": _onto_l2, "l1": _onto_l1}


def random_start(
    keys: jax.Array, images: jax.Array, epsilon: jax.Array, norm: str
) -> jax.Array:
    """A start on the surface of the ball, then clipped to [0, 1].

    Its direction is uniform in the cube for Linf, Gaussian otherwise.

    Args:
      keys: [B] one key an image.
      images: [B, H, W, C] float in [0, 1].
      epsilon: [] float >= 0.
      norm: a key of `LENGTHS`.

    Returns:
      [B, H, W, C]; for L1 the projection of Gaussian noise.
    """

    def draw(key: jax.Array) -> jax.Array:
        if norm == "linf":
            return jax.random.uniform(key, images.shape[1:], minval=-1.0)
        return jax.random.normal(key, images.shape[1:])

    # One key an image, so that an image's start is its own.
    direction = jax.vmap(draw)(keys)
    if norm == "l1":
        return onto(images + direction, images, epsilon, norm)
    return jnp.clip(images + scaled_to(direction, epsilon, norm), 0.0, 1.0)


def image_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
    """One key an image, by its place in the data set: [], [B] int -> [B]."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
