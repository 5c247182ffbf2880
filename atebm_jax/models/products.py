"""Products of few rows, convolutions as products, max pooling as shifted maxima.

What XLA does on CPU with the general forms is slow (`benchmarks/README.md`). NHWC,
reverse-mode derivatives of any order.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Padding = tuple[tuple[int, int], tuple[int, int]]

# Numbers of a matrix that stays in a core's cache.
SMALL_MATRIX = 2**18
# Rows, of all devices, up to which their product with a larger matrix is made the other
# way round.
_FEW_ROWS = 32


def multiply(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """rows @ matrix: [..., K], [K, N] -> [..., N], of one float dtype.

    XLA's product on CPU copies its second factor into blocks, which for few rows takes
    longer than the arithmetic. Where a derivative is asked for, as in PGD, that factor
    is therefore the rows. Reverse-mode derivatives of any order.
    """
    few = math.prod(rows.shape[:-1]) <= _FEW_ROWS and matrix.size > SMALL_MATRIX
    if few and jnp.finfo(rows.dtype).bits >= 32:
        return _multiply_few(rows, matrix)
    return rows @ matrix


@jax.custom_vjp
def _multiply_few(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    return rows @ matrix


def _swapped(rows: jax.Array, transposed: jax.Array) -> jax.Array:
    """[..., K], [N, K] -> [..., N]; the barrier keeps XLA from swapping back."""
    flat = rows.reshape(-1, rows.shape[-1])
    made = lax.optimization_barrier(
        lax.dot_general(transposed, flat, (((1,), (1,)), ((), ())))
    )
    return made.T.reshape(*rows.shape[:-1], len(transposed))


def _few_fwd(
    rows: jax.Array, matrix: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Transposed before a loop, not in each of its steps; for one product alone the copy
    # would cost more than it gains.
    transposed = lax.optimization_barrier(matrix.T)
    return _swapped(rows, transposed), (rows, matrix)


def _few_bwd(
    residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    rows, matrix = residuals
    axes = tuple(range(rows.ndim - 1))
    return _swapped(cotangent, matrix), jnp.tensordot(rows, cotangent, (axes, axes))


_multiply_few.defvjp(_few_fwd, _few_bwd)


def conv_tiles(
    images: jax.Array, kernel: jax.Array, strides: tuple[int, int]
) -> jax.Array:
    """Convolution without padding whose windows do not overlap: one product.

    Args:
      images: [B, H, W, I].
      kernel: [h, w, I, O], h and w at most the strides.
      strides: (vertical, horizontal).

    Returns:
      [B, H', W', O].
    """
    (h, w, inputs, outputs), (down, right) = kernel.shape, strides
    rows = (images.shape[1] - h) // down + 1
    columns = (images.shape[2] - w) // right + 1
    if (h, w) == (1, 1):
        return multiply(images[:, ::down, ::right], kernel[0, 0])
    fits = ((0, rows * down), (0, columns * right))
    images = _cut_or_fill(images, fits)
    tiles = images.reshape(-1, rows, down, columns, right, inputs)[:, :, :h, :, :w]
    tiles = tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows, columns, h * w * inputs)
    return multiply(tiles, kernel.reshape(h * w * inputs, outputs))


def _cut_or_fill(
    images: jax.Array, spans: tuple[tuple[int, int], tuple[int, int]]
) -> jax.Array:
    """Rows and columns [start, end) of images, zeros where there are none."""
    edges = [
        (-start, end - size, 0)
        for (start, end), size in zip(spans, images.shape[1:3], strict=True)
    ]
    zero = jnp.zeros((), images.dtype)
    return lax.pad(images, zero, [(0, 0, 0), *edges, (0, 0, 0)])


def conv_patches(
    images: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding
) -> jax.Array:
    """Convolution as the product of all patches, h w I numbers each, and the kernel.

    Arguments and result as `layers.conv_xla`, one group.
    """
    h, w, inputs, outputs = kernel.shape
    seen = patches(images, (h, w), strides, padding)
    return multiply(seen, kernel.reshape(h * w * inputs, outputs))


def patches(
    images: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding,
) -> jax.Array:
    """What a window sees at each of its places: [B, H, W, C] -> [B, H', W', h w C].

    Args:
      images: [B, H, W, C].
      window: (h, w).
      strides: (vertical, horizontal).
      padding: ((top, bottom), (left, right)) zeros; less than none cuts.
    """
    seen = _shifted(images, window, strides, padding, jnp.zeros((), images.dtype))
    return jnp.concatenate(seen, axis=-1)


def largest_divisor(count: int, most: int) -> int:
    """The largest divisor of a positive count that is at most `most`; at least 1."""
    divisors = (n for n in range(1, min(count, most) + 1) if count % n == 0)
    return max(divisors, default=1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_whole(
    images: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding
) -> jax.Array:
    """Convolution as one product of whole images and a matrix made of the kernel.

    For images of no more pixels than the window, most of which sees padding only. The
    kernel gradient is that of `conv_patches`: the matrix has more numbers, which
    devices would have to send each other. Arguments and result as `layers.conv_xla`,
    one group.
    """
    matrix, made = _matrix(images, kernel, strides, padding)
    return (images.reshape(-1, len(matrix)) @ matrix).reshape(-1, *made)


def _matrix(
    images: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding
) -> tuple[jax.Array, tuple[int, int, int]]:
    """[H W I, H' W' O], and (H', W', O)."""
    rows, columns = (
        _places(*axis)
        for axis in zip(
            images.shape[1:3], kernel.shape[:2], strides, padding, strict=True
        )
    )
    # One more row and column of zeros, where `_places` points outside the window.
    padded = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    # [H, H', W, W', I, O] -> [H, W, I, H', W', O].
    matrix = padded[rows[:, :, None, None], columns[None, None]]
    matrix = matrix.transpose(0, 2, 4, 1, 3, 5)
    made = (rows.shape[1], columns.shape[1], kernel.shape[3])
    # Made before a loop, not in each of its steps.
    return lax.optimization_barrier(matrix.reshape(-1, math.prod(made))), made


def _whole_fwd(
    images: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return conv_whole(images, kernel, strides, padding), (images, kernel)


def _whole_bwd(
    strides: tuple[int, int],
    padding: Padding,
    residuals: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    images, kernel = residuals
    matrix, made = _matrix(images, kernel, strides, padding)
    image_gradient = cotangent.reshape(-1, math.prod(made)) @ matrix.T
    _, kernel_pullback = jax.vjp(
        lambda k: conv_patches(images, k, strides, padding), kernel
    )
    return image_gradient.reshape(images.shape), kernel_pullback(cotangent)[0]


conv_whole.defvjp(_whole_fwd, _whole_bwd)


def _places(
    size: int, window: int, stride: int, padding: tuple[int, int]
) -> np.ndarray:
    """Which row of the window sees input row y for output row r: [y, r].

    `window` where none does.
    """
    made = (size + sum(padding) - window) // stride + 1
    place = np.arange(size)[:, None] + padding[0] - stride * np.arange(made)[None]
    return np.where((place >= 0) & (place < window), place, window)


def _shifted(
    images: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding,
    fill: jax.Array,
) -> list[jax.Array]:
    """What each position of the window sees: h w arrays [B, H', W', C], row by row."""
    padded = lax.pad(
        images, fill, [(0, 0, 0), *((*edges, 0) for edges in padding), (0, 0, 0)]
    )
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


def max_pool_shifted(
    images: jax.Array, window: tuple[int, int], strides: tuple[int, int], pad: Padding
) -> jax.Array:
    """Max pooling [B, H, W, C] -> [B, H', W', C] as maxima of shifted images.

    Of equal elements the first of a window, row by row, has the gradient; NaN wins.

    Args:
      images: [B, H, W, C] float.
      window: (height, width).
      strides: (vertical, horizontal).
      pad: ((top, bottom), (left, right)) elements that never win.
    """
    return _max_pool(images, window, strides, pad)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(
    images: jax.Array, window: tuple[int, int], strides: tuple[int, int], pad: Padding
) -> jax.Array:
    return _pool_fwd(images, window, strides, pad)[0]


def _pool_fwd(
    images: jax.Array, window: tuple[int, int], strides: tuple[int, int], pad: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    lowest = jnp.array(-jnp.inf, images.dtype)
    best, *others = _shifted(images, window, strides, pad, lowest)
    winner = jnp.zeros(best.shape, jnp.int8)
    for position, seen in enumerate(others, start=1):
        better = (seen > best) | jnp.isnan(seen)
        best = jnp.where(better, seen, best)
        winner = jnp.where(better, jnp.int8(position), winner)
    # Of the images only the shape is used, and nothing of them kept.
    return best, (winner, images)


def _pool_bwd(
    window: tuple[int, int],
    strides: tuple[int, int],
    pad: Padding,
    residuals: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array]:
    winner, images = residuals
    down, right = strides
    # How many windows before its own an element may lie in, in either direction.
    before = [(side - 1) // stride for side, stride in zip(window, strides)]
    rows, columns = (
        size + extra for size, extra in zip(winner.shape[1:3], before, strict=True)
    )
    edges = [(0, 0), *((extra, extra) for extra in before), (0, 0)]
    winner = jnp.pad(winner, edges, constant_values=-1)
    cotangent = jnp.pad(cotangent, edges)

    def at(i: int, j: int) -> jax.Array:
        """Gradient of the elements that a window sees at its position (i, j)."""
        top, left = before[0] - i // down, before[1] - j // right
        here = (slice(None), slice(top, top + rows), slice(left, left + columns))
        won = winner[here] == i * window[1] + j
        return jnp.where(won, cotangent[here], 0)

    phases = [
        sum(
            at(i, j)
            for i in range(a, window[0], down)
            for j in range(b, window[1], right)
        )
        + jnp.zeros((len(images), rows, columns, images.shape[3]), cotangent.dtype)
        for a in range(down)
        for b in range(right)
    ]
    whole = jnp.stack(phases, axis=3).reshape(
        len(images), rows, columns, down, right, -1
    )
    whole = whole.transpose(0, 1, 3, 2, 4, 5).reshape(
        len(images), rows * down, columns * right, -1
    )
    spans = [
        (low, low + size) for (low, _), size in zip(pad, images.shape[1:3], strict=True)
    ]
    return (_cut_or_fill(whole, (spans[0], spans[1])),)


_max_pool.defvjp(_pool_fwd, _pool_bwd)
