"""Depthwise convolution: one window a channel, NHWC, stride 1, same size.

XLA's CPU convolution does depthwise windows one number at a time. Written as a sum of
shifted, scaled images it becomes one vectorised loop, forward and backward.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from atebm_jax.models.layers import at_least_float32, chosen_form, outside_loops
from atebm_jax.models.products import largest_divisor


def depthwise_xla(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """Depthwise convolution by XLA, with XLA's gradients.

    Args:
      images: [B, H, W, C].
      kernel: [k, k, 1, C], k odd, of the same dtype.

    Returns:
      [B, H, W, C]: zeros beyond the border.
    """
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        images,
        kernel,
        (1, 1),
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=images.shape[-1],
    )


@jax.custom_vjp
def depthwise_shifted(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`depthwise_xla` as a sum over the window of shifted images times a number each.

    The sum runs in float32 at least. Reverse-mode derivatives only, of any order: the
    image gradient is the same function of the flipped kernel.
    """
    return _sum_shifted(images, kernel)


# Compiled apart: equal layers of a network then share one trace.
@jax.jit
def _sum_shifted(images: jax.Array, kernel: jax.Array) -> jax.Array:
    side = len(kernel)
    height, width = images.shape[1:3]
    wide = at_least_float32(images)
    weights = at_least_float32(kernel)[:, :, 0, None, None, :]
    if max(height, width) <= side // 2 + 1:
        return _sum_pixels(wide, weights).astype(images.dtype)
    padded = _padded(wide, side)

    def add_row(top: jax.Array, made: jax.Array) -> jax.Array:
        seen = lax.dynamic_slice_in_dim(padded, top, side, axis=1)
        # Sums of sums: one sum of all compiles to slower code.
        row = sum(
            sum(seen[:, i, j : j + width] * weights[i, j] for j in range(side))
            for i in range(side)
        )
        return lax.dynamic_update_slice_in_dim(
            made, jnp.asarray(row)[:, None], top, axis=1
        )

    # Without a loop XLA would put the whole sum into every loop that reads the result,
    # six times for a block of a ConvNeXt.
    total = lax.fori_loop(0, height, add_row, jnp.zeros_like(wide))
    return total.astype(images.dtype)


def _sum_pixels(images: jax.Array, weights: jax.Array) -> jax.Array:
    """The same for images so small that every pixel sees every other one.

    Then there are fewer pixels than window elements, and none of them lies beyond the
    border: y[p] = sum over q of x[q] w[q - p].
    """
    side = len(weights)
    height, width = images.shape[1:3]
    rows, columns = np.divmod(np.arange(height * width), width)
    row_shift = rows[:, None] - rows[None, :] + side // 2
    column_shift = columns[:, None] - columns[None, :] + side // 2
    # For every pixel q what it adds to each p: [q, p, C].
    table = outside_loops(weights[row_shift, column_shift, 0, 0])
    pixels = images.reshape(len(images), height * width, -1)
    total = sum(pixels[:, q, None, :] * table[None, q] for q in range(height * width))
    return jnp.asarray(total).reshape(images.shape)


def _padded(images: jax.Array, side: int) -> jax.Array:
    pad = (side // 2, side // 2)
    return jnp.pad(images, ((0, 0), pad, pad, (0, 0)))


def _fwd(
    images: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return depthwise_shifted(images, kernel), (images, kernel)


def _bwd(
    residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    images, kernel = residuals
    image_gradient = depthwise_shifted(cotangent, jnp.flip(kernel, (0, 1)))
    return image_gradient, _kernel_gradient(images, kernel, cotangent)


@jax.jit
def _kernel_gradient(
    images: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> jax.Array:
    side = len(kernel)
    count, height, width, channels = images.shape
    padded = _padded(at_least_float32(images), side)
    wide = at_least_float32(cotangent)
    # About 16 pixels a turn: longer sums compile to slow code.
    together = largest_divisor(height, 16 // width)

    def add_rows(
        turn: jax.Array, totals: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
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

    # A sum an image, one array a row of the window: vectors run along the channels, and
    # devices that share a batch have one sum to exchange, after the loop.
    nothing = tuple(jnp.zeros((count, side, channels), wide.dtype) for _ in range(side))
    totals = lax.fori_loop(0, height // together, add_rows, nothing)
    made = jnp.stack([total.sum(axis=0) for total in totals])
    return made.reshape(kernel.shape).astype(kernel.dtype)


depthwise_shifted.defvjp(_fwd, _bwd)

# By the names of `layers.CONV_GRADIENTS`: each setting picks one of either kind.
DEPTHWISE: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "xla": depthwise_xla,
    "forward": depthwise_shifted,
    "joined": depthwise_shifted,
}


def depthwise_function(
    conv_gradient: str,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The depthwise convolution for a `conv_gradient` setting.

    Args:
      conv_gradient: as in `layers.chosen_form`; "forward" are shifted images.

    Raises:
      UserError: an unknown one.
    """
    return DEPTHWISE[chosen_form(conv_gradient)]


class DepthwiseConv(nn.Module):
    """Depthwise convolution with a bias.

    Attributes:
      kernel_size: odd side of the square window.
      dtype: compute dtype; the parameters are float32.
      conv_gradient: see `depthwise_function`.
    """

    kernel_size: int
    dtype: Any = jnp.float32
    conv_gradient: str = "auto"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        channels = images.shape[-1]
        shape = (self.kernel_size, self.kernel_size, 1, channels)
        init = nn.initializers.truncated_normal(0.02)
        kernel = self.param("kernel", init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        convolve = depthwise_function(self.conv_gradient)
        x = convolve(images.astype(self.dtype), kernel.astype(self.dtype))
        return x + bias.astype(self.dtype)[None, None, None, :]
