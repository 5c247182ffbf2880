"""Convolutions with few outputs, several neighbouring windows at once.

On CPU XLA is slow where a convolution has few output channels: neither its matrix
products nor its copies of patches pay then. A window as wide as several neighbours
together, in steps of as many pixels, has the outputs of all of them as its channels,
and in NHWC those already lie where they belong. The wider kernel has zeros where a
neighbour does not look: more arithmetic, done much faster (`benchmarks/README.md`).
"""

import jax
import jax.numpy as jnp
from jax import lax

from atebm_jax.models.products import Padding

# More outputs than these are fast as they are.
_FEW = 16
# Outputs to come up to, and those for hardly any inputs, where patches cost most.
_WANTED, _WANTED_FROM_PIXELS = 32, 64
_PIXEL_CHANNELS = 4
_MOST_WINDOWS = 8


def windows_at_once(
    images: jax.Array, kernel: jax.Array, padding: Padding, groups: int
) -> int:
    """How many neighbouring windows to join, a power of two; 1 for none.

    Args:
      images: [B, H, W, I].
      kernel: [h, w, I / groups, O].
      padding: as of `layers.conv_xla`, with stride 1.
      groups: number of channel groups.
    """
    _, width, inputs, outputs = kernel.shape
    if groups > 1 or outputs > _FEW or width < 3 or images.dtype != jnp.float32:
        return 1
    wanted = _WANTED_FROM_PIXELS if inputs <= _PIXEL_CHANNELS else _WANTED
    count = 1
    made = images.shape[2] + sum(padding[1]) - width + 1
    while (
        2 * count <= _MOST_WINDOWS
        and 2 * count * outputs <= wanted
        and made % (2 * count) == 0
    ):
        count *= 2
    return count


def widened(kernel: jax.Array, count: int) -> jax.Array:
    """[h, w, I, O] -> [h, w + count - 1, I, count * O], a copy shifted for each."""
    height, width, inputs, _ = kernel.shape
    copies = [
        jnp.pad(kernel, ((0, 0), (shift, count - 1 - shift), (0, 0), (0, 0)))
        for shift in range(count)
    ]
    return jnp.stack(copies, axis=3).reshape(height, width + count - 1, inputs, -1)


def conv_narrow(
    images: jax.Array, wide: jax.Array, count: int, padding: Padding
) -> jax.Array:
    """Convolution of stride 1 by a kernel that `widened` made for `count` windows.

    Args:
      images: [B, H, W, I].
      wide: [h, w + count - 1, I, count * O].
      count: of windows, divides the result's width.
      padding: ((top, bottom), (left, right)) zeros.

    Returns:
      [B, H', W', O].
    """
    made = lax.conv_general_dilated(
        images,
        wide,
        window_strides=(1, count),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    batch, height, groups, channels = made.shape
    return made.reshape(batch, height, groups * count, channels // count)
