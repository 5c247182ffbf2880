"""Square attack (Andriushchenko et al., 2020): random search without gradients.

Changes squares of pixels at random places and keeps what lowers the margin. The
squares shrink by a fixed schedule. Every image draws from its own key.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atebm_jax.autoattack import balls
from atebm_jax.autoattack.apgd import ModelFn
from atebm_jax.autoattack.balls import per_image
from atebm_jax.autoattack.objectives import margin

_FIRST_SHARE = 0.8
# After these queries of 10,000 the share of pixels in the square is halved.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_QUERIES = 10_000

NORMS = ("linf", "l2")


class State(NamedTuple):
    """The search after some queries."""

    best: jax.Array  #: [B, H, W, C] the images of the lowest margin so far
    lowest: jax.Array  #: [B] f[y] - max_{k != y} f[k] there, not positive once fooled


class _Draw(NamedTuple):
    """Two windows by their upper left corners, and what the first is filled with."""

    corner: tuple[jax.Array, jax.Array]  #: rows and columns, [B] int32 each
    other_corner: tuple[jax.Array, jax.Array]
    signs: jax.Array  #: [B, 1, 1, C]
    transposed: jax.Array  #: [B] bool


def side(
    query: jax.Array, num_queries: jax.Array, shape: tuple, norm: str
) -> jax.Array:
    """Side of the square in pixels at a query: [] int32.

    The published schedule is for 10,000 queries and is stretched to `num_queries`. L2
    patterns have a middle: their side is odd and at least 3, where that fits.
    """
    height, width, _ = shape
    progress = (query * (_QUERIES / num_queries)).astype(jnp.int32)
    halvings = (progress > jnp.asarray(_HALVINGS, jnp.int32)).sum()
    share = _FIRST_SHARE * 0.5 ** halvings.astype(jnp.float32)
    size = jnp.round(jnp.sqrt(share * (height * width))).astype(jnp.int32)
    if norm == "l2":
        size = jnp.maximum(size, 3)
        size = size + (size + 1) % 2
    return jnp.clip(size, 1, min(height, width))


def search(
    model: ModelFn,
    key: jax.Array,
    keys: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    epsilon: jax.Array,
    num_queries: jax.Array,
    *,
    norm: str,
) -> State:
    """Lowers the margin by random search.

    Args:
      model: images and key to logits.
      key: for randomised networks.
      keys: [B] one key an image.
      images: [B, H, W, C] in [0, 1].
      labels: [B] int.
      epsilon: [] radius >= 0.
      num_queries: [] int32, beside that of the start.
      norm: "linf" or "l2".
    """
    change = _change_linf if norm == "linf" else _change_l2

    def margin_at(x: jax.Array, index: jax.Array) -> jax.Array:
        return -margin(model(x, jax.random.fold_in(key, index)), labels)

    def keys_at(index: jax.Array) -> jax.Array:
        return jax.vmap(lambda k: jax.random.fold_in(k, index))(keys)

    def query(index: jax.Array, state: State) -> State:
        size = side(index, num_queries, images.shape[1:], norm)
        draw = _draw(keys_at(index + 1), images.shape[1:], size)
        x = change(images, epsilon, size, draw, state.best)
        value = margin_at(x, index + 1)
        # An image that is fooled rests: no more queries are counted against it.
        searching = state.lowest > 0
        better = searching & ((value < state.lowest) | (value <= 0))
        return State(
            jnp.where(per_image(better), x, state.best),
            jnp.where(better, value, state.lowest),
        )

    first = jnp.int32(0)
    x = _start(keys_at(first), images, epsilon, norm)
    return jax.lax.fori_loop(0, num_queries, query, State(x, margin_at(x, first)))


def _start(
    keys: jax.Array, images: jax.Array, epsilon: jax.Array, norm: str
) -> jax.Array:
    """Stripes for Linf, a grid of tiles for L2."""
    height, width, channels = images.shape[1:]
    if norm == "linf":
        stripe = lambda k: jax.random.rademacher(k, (1, width, channels), jnp.float32)
        return jnp.clip(images + epsilon * jax.vmap(stripe)(keys), 0.0, 1.0)
    delta = _tiles(keys, height, width, channels)
    return jnp.clip(images + balls.scaled_to(delta, epsilon, norm), 0.0, 1.0)


def _draw(keys: jax.Array, shape: tuple[int, ...], size: jax.Array) -> _Draw:
    height, width, channels = shape
    # All words of an image's query at once: one hash instead of six.
    words = jax.vmap(lambda k: jax.random.bits(k, (5 + channels,), jnp.uint32))(keys)
    uniform = (words >> 8).astype(jnp.float32) * 2.0**-24

    def corner(column: int, length: int) -> jax.Array:
        places = (length - size + 1).astype(jnp.float32)
        place = (uniform[:, column] * places).astype(jnp.int32)
        return jnp.minimum(place, length - size)

    signs = jnp.where(uniform[:, 5:] < 0.5, -1.0, 1.0)[:, None, None, :]
    first, second = ((corner(k, height), corner(k + 1, width)) for k in (0, 2))
    return _Draw(first, second, signs, uniform[:, 4] < 0.5)


def _window(
    corner: tuple[jax.Array, jax.Array], size: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """[B, H, W, 1] bool, true in the square."""

    def inside(begin: jax.Array, length: int) -> jax.Array:
        place = jnp.arange(length)[None, :] - begin[:, None]
        return (place >= 0) & (place < size)

    tall, wide = (inside(*pair) for pair in zip(corner, shape))
    return (tall[:, :, None] & wide[:, None, :])[..., None]


def _change_linf(
    images: jax.Array, epsilon: jax.Array, size: jax.Array, draw: _Draw, best: jax.Array
) -> jax.Array:
    """Every pixel of the square goes to one end of its interval, a sign a channel."""
    window = _window(draw.corner, size, images.shape[1:])
    moved = jnp.where(window, best + 2.0 * epsilon * draw.signs, best)
    return balls.onto(moved, images, epsilon, "linf")


def _change_l2(
    images: jax.Array, epsilon: jax.Array, size: jax.Array, draw: _Draw, best: jax.Array
) -> jax.Array:
    """Moves the second window's budget, and what was left, into the first one."""
    shape = images.shape[1:]
    delta = best - images
    window = _window(draw.corner, size, shape)
    other = _window(draw.other_corner, size, shape)
    unused = jnp.maximum(epsilon**2 - _square(delta).sum(axis=-1, keepdims=True), 0.0)
    freed = _square(jnp.where(window | other, delta, 0.0))
    budget = jnp.sqrt(freed + unused / shape[-1])
    inside = jnp.where(window, delta, 0.0)
    old = inside / (1e-12 + jnp.sqrt(_square(inside)))
    new = jnp.where(window, draw.signs * _pattern(draw, size, shape) + old, 0.0)
    new = new * (budget / (1e-12 + jnp.sqrt(_square(new))))
    delta = jnp.where(window, new, jnp.where(other, 0.0, delta))
    return jnp.clip(images + balls.scaled_to(delta, epsilon, "l2"), 0.0, 1.0)


def _square(x: jax.Array) -> jax.Array:
    """Squared length of each channel: [B, H, W, C] -> [B, 1, 1, C]."""
    return jnp.square(x).sum(axis=(1, 2), keepdims=True)


def _pattern(draw: _Draw, size: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Two bumps of opposite sign side by side in the window, [B, H, W, 1]."""
    rows, columns = (corner[:, None, None] for corner in draw.corner)
    down = jnp.arange(shape[0])[None, :, None] - rows
    right = jnp.arange(shape[1])[None, None, :] - columns
    flip = draw.transposed[:, None, None]
    value = _bumps(jnp.where(flip, right, down), jnp.where(flip, down, right), size)
    return value[..., None]


def _bumps(along: jax.Array, across: jax.Array, size: jax.Array) -> jax.Array:
    """The pattern by place in a window of side `size`, zero outside.

    A bump fills a half of the window. It is a pile of growing squares around the
    half's middle, the k-th of height 1 / k^2 (Andriushchenko et al., 2020, eq. 2):
    at Chebyshev distance r from the middle it is as high as the squares after the
    r-th together. Each half is scaled to length one.

    Args:
      along, across: [B, H, W] int32 places in the window.
      size: [] int32.
    """
    half = size // 2
    inside = (along >= 0) & (along < size) & (across >= 0) & (across < size)
    upper = along < half
    # The last table entry is never reached: no window is larger than the image.
    heights = np.zeros(max(along.shape[1:]) + 2, np.float32)
    heights[1:] = np.cumsum(1.0 / np.arange(1, len(heights)) ** 2)
    table = jnp.asarray(heights)
    height = jnp.where(upper, half, size - half)
    middle = jnp.where(upper, 0, half) + height // 2
    away = jnp.maximum(jnp.abs(along - middle), jnp.abs(across - size // 2))
    levels = jnp.maximum(height // 2, size // 2) + 1
    pile = jnp.where(inside, table[levels] - table[jnp.where(inside, away, 0)], 0.0)
    first, second = jnp.where(upper, pile, 0.0), jnp.where(upper, 0.0, pile)
    return _unit(first) - _unit(second)


def _unit(x: jax.Array) -> jax.Array:
    """[B, H, W] -> the same, each image of length one or zero."""
    return x / jnp.sqrt(jnp.square(x).sum(axis=(1, 2), keepdims=True) + 1e-24)


def _tiles(keys: jax.Array, height: int, width: int, channels: int) -> jax.Array:
    """A grid of about 5 by 5 patterns with random signs, [B, H, W, C]."""
    size = max(min(height, width) // 5, 1)
    grid = (height // size, width // size)
    axes = [
        np.arange(length) - (length - size * count) // 2
        for length, count in zip((height, width), grid, strict=True)
    ]
    covered = np.logical_and.outer(
        *((a >= 0) & (a < size * n) for a, n in zip(axes, grid, strict=True))
    )
    along, across = (jnp.asarray(p) for p in np.meshgrid(*axes, indexing="ij"))
    row, column = (np.clip(a // size, 0, n - 1) for a, n in zip(axes, grid))
    down, right = ((p % size).astype(jnp.int32)[None] for p in (along, across))

    def one(key: jax.Array) -> jax.Array:
        key_signs, key_flip = jax.random.split(key)
        signs = jax.random.rademacher(key_signs, (*grid, channels), jnp.float32)
        signs = signs[row][:, column]
        flip = jax.random.bernoulli(key_flip)
        first, second = (jnp.where(flip, *p) for p in ((right, down), (down, right)))
        pattern = _bumps(first, second, jnp.int32(size))[0]
        return jnp.where(covered, pattern, 0.0)[..., None] * signs

    return jax.vmap(one)(keys)
