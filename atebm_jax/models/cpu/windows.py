"""What the windows of a convolution or pooling see, as copies of shifted images."""

import jax
import jax.numpy as jnp
from jax import lax

#: Zeros (top, bottom) and (left, right).
Padding = tuple[tuple[int, int], tuple[int, int]]


def shifted(
    images: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding,
    fill: float = 0.0,
) -> list[jax.Array]:
    """What each element of a window sees: h w arrays [B, H', W', C], row by row.

    Args:
      images: [B, H, W, C].
      window: (h, w).
      strides: (vertical, horizontal).
      padding: elements around the images; negative numbers cut.
      fill: value of the padding.
    """
    edges = [(0, 0, 0), *((*edge, 0) for edge in padding), (0, 0, 0)]
    padded = lax.pad(images, jnp.array(fill, images.dtype), edges)
    rows, columns = (
        (size - side) // stride + 1
        for size, side, stride in zip(padded.shape[1:3], window, strides, strict=True)
    )
    down, right = strides
    return [
        padded[:, i : i + rows * down : down, j : j + columns * right : right]
        for i in range(window[0])
        for j in range(window[1])
    ]


def patches(
    images: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding,
) -> jax.Array:
    """What a window sees at each of its places: [B, H, W, C] -> [B, H', W', h w C].

    Arguments as `shifted`.
    """
    return jnp.concatenate(shifted(images, window, strides, padding), axis=-1)


def max_pool(
    images: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding,
) -> jax.Array:
    """Max pooling as maxima of shifted images: [B, H, W, C] -> [B, H', W', C].

    Of equal elements the first of a window, row by row, has the gradient; NaN wins.
    Arguments as `shifted`; the padding never wins.
    """
    best, *others = shifted(images, window, strides, padding, fill=-jnp.inf)
    for seen in others:
        best = jnp.where((seen > best) | jnp.isnan(seen), seen, best)
    return best


def largest_divisor(count: int, most: int) -> int:
    """The largest divisor of a positive count that is at most `most`; at least 1."""
    return max(n for n in range(1, max(most, 1) + 1) if count % n == 0)
