"""Depthwise convolution as a sum of shifted, scaled images.

XLA's CPU convolution computes depthwise windows one number at a time. A sum of images
is one vectorised loop, forward and backward.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from atebm_jax.models.cpu.windows import largest_divisor

Pair = tuple[jax.Array, jax.Array]
Sums = tuple[jax.Array, ...]


@jax.custom_vjp
def depthwise(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """One window a channel, stride 1, zeros beyond the border, the images' size.

    The sum runs in float32 at least.

    Args:
      images: [B, H, W, C].
      kernel: [k, k, 1, C], k odd, of the same dtype.
    """
    return _sum_shifted(images, kernel)


# Compiled apart: equal layers of a network then share one trace.
@jax.jit
def _sum_shifted(images: jax.Array, kernel: jax.Array) -> jax.Array:
    side = len(kernel)
    height, width = images.shape[1:3]
    wide = _wide(images)
    weights = _wide(kernel)[:, :, 0, None, None, :]
    if max(height, width) <= side // 2 + 1:
        return _sum_pixels(wide, weights).astype(images.dtype)
    padded = _padded(wide, side // 2)

    def add_row(top: jax.Array, made: jax.Array) -> jax.Array:
        seen = lax.dynamic_slice_in_dim(padded, top, side, axis=1)
        # Sums of sums: one sum of all compiles to slower code.
        row = sum(
            sum(seen[:, i, j : j + width] * weights[i, j] for j in range(side))
            for i in range(side)
        )
        row = jnp.asarray(row)[:, None]
        return lax.dynamic_update_slice_in_dim(made, row, top, axis=1)

    # Without a loop XLA would put the whole sum into every loop that reads the result,
    # six times for a block of a ConvNeXt.
    total = lax.fori_loop(0, height, add_row, jnp.zeros_like(wide))
    return total.astype(images.dtype)


def _sum_pixels(images: jax.Array, weights: jax.Array) -> jax.Array:
    """The same for images so small that every pixel sees every other one.

    They have fewer pixels than a window has elements, and a sum over pixels needs no
    padding: y[p] = sum over q of x[q] w[q - p].
    """
    side = len(weights)
    height, width = images.shape[1:3]
    rows, columns = np.divmod(np.arange(height * width), width)
    row_shift, column_shift = (
        place[:, None] - place[None, :] + side // 2 for place in (rows, columns)
    )
    # For every pixel q what it adds to each p: [q, p, C]. Behind the barrier, XLA makes
    # it once before a loop, not in each step.
    table = lax.optimization_barrier(weights[row_shift, column_shift, 0, 0])
    pixels = images.reshape(images.shape[0], height * width, -1)
    total = sum(pixels[:, q, None, :] * table[None, q] for q in range(height * width))
    return jnp.asarray(total).reshape(images.shape)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(np.promote_types(x.dtype, np.float32))


def _padded(images: jax.Array, half: int) -> jax.Array:
    return jnp.pad(images, ((0, 0), (half, half), (half, half), (0, 0)))


def _forward(images: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Pair]:
    return depthwise(images, kernel), (images, kernel)


def _backward(residuals: Pair, cotangent: jax.Array) -> Pair:
    images, kernel = residuals
    # The image gradient is the same function of the flipped kernel.
    image_gradient = depthwise(cotangent, jnp.flip(kernel, (0, 1)))
    return image_gradient, _kernel_gradient(images, kernel, cotangent)


@jax.jit
def _kernel_gradient(
    images: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> jax.Array:
    side = len(kernel)
    count, height, width, channels = images.shape
    padded = _padded(_wide(images), side // 2)
    wide = _wide(cotangent)
    # About 16 pixels a turn: longer sums compile to slow code.
    together = largest_divisor(height, 16 // width)

    def add_rows(turn: jax.Array, totals: Sums) -> Sums:
        top = turn * together
        seen = lax.dynamic_slice_in_dim(padded, top, side + together - 1, axis=1)
        rows = lax.dynamic_slice_in_dim(wide, top, together, axis=1)
        return tuple(
            total
            + sum(
                seen[:, i + r, w : w + side] * rows[:, r, w : w + 1]
                for r in range(together)
                for w in range(width)
            )
            for i, total in enumerate(totals)
        )

    # Each image has a sum of its own, so that devices that share a batch exchange one
    # sum, after the loop. Each row of the window is an array of its own, so that
    # vectors run along the channels.
    nothing = tuple(jnp.zeros((count, side, channels), wide.dtype) for _ in range(side))
    totals = lax.fori_loop(0, height // together, add_rows, nothing)
    made = jnp.stack([total.sum(axis=0) for total in totals])
    return made.reshape(kernel.shape).astype(kernel.dtype)


depthwise.defvjp(_forward, _backward)
