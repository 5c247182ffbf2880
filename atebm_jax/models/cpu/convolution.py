"""Convolutions whose value and gradients are products or plain convolutions."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from atebm_jax.models.cpu.depthwise import Pair, depthwise
from atebm_jax.models.cpu.kernel_gradient import kernel_gradient
from atebm_jax.models.cpu.windows import Padding, patches

_plain = partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def conv(
    images: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Padding,
    groups: int = 1,
) -> jax.Array:
    """2-D convolution; arguments and result as `layers.conv`.

    A window for each channel becomes a sum of shifted images. Windows that lie side by
    side become one matrix product. So do patches, where the window has more elements
    than the image or the result has pixels: XLA swaps the two there and convolves the
    kernel with the images, hundreds of times slower. Other groups stay XLA's.
    """
    window = (kernel.shape[0], kernel.shape[1])
    if groups > 1:
        half = window[0] // 2
        same_size = (window, padding) == ((2 * half + 1,) * 2, ((half, half),) * 2)
        by_channel = groups == images.shape[-1] == kernel.shape[-1]
        if by_channel and same_size and strides == (1, 1):
            return depthwise(images, kernel)
        return _plain(images, kernel, strides, padding, feature_group_count=groups)
    if padding == ((0, 0), (0, 0)) and window in ((1, 1), strides):
        return _product_of_tiles(images, kernel, strides)
    seen = images.shape[1] * images.shape[2]
    made = math.prod(
        (images.shape[axis + 1] + sum(padding[axis]) - window[axis]) // strides[axis]
        + 1
        for axis in (0, 1)
    )
    if math.prod(window) > min(seen, made):
        rows = patches(images, window, strides, padding)
        return rows @ kernel.reshape(rows.shape[-1], -1)
    return _conv(images, kernel, strides, padding)


def _product_of_tiles(
    images: jax.Array, kernel: jax.Array, strides: tuple[int, int]
) -> jax.Array:
    """Convolution by a window of one pixel, or by one as large as the strides."""
    height, width, inputs, outputs = kernel.shape
    if (height, width) == (1, 1):
        images = images[:, :: strides[0], :: strides[1]]
    rows, columns = images.shape[1] // height, images.shape[2] // width
    images = images[:, : rows * height, : columns * width]
    tiles = images.reshape(images.shape[0], rows, height, columns, width, inputs)
    tiles = tiles.transpose(0, 1, 3, 2, 4, 5)
    tiles = tiles.reshape(images.shape[0], rows, columns, height * width * inputs)
    return tiles @ kernel.reshape(-1, outputs)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(
    images: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding
) -> jax.Array:
    """A convolution whose image gradient is itself written as a plain convolution.

    XLA expresses the image gradient with permuted dimension numbers. On CPU such a
    convolution is slow inside a loop body, where it is not put into the canonical
    layout. The flipped and transposed kernel gives the canonical layout everywhere.
    """
    return _plain(images, kernel, strides, padding)


def _forward(
    images: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding
) -> tuple[jax.Array, Pair]:
    return _plain(images, kernel, strides, padding), (images, kernel)


def _backward(
    strides: tuple[int, int], padding: Padding, residuals: Pair, cotangent: jax.Array
) -> Pair:
    images, kernel = residuals
    window = (kernel.shape[0], kernel.shape[1])
    # Behind the barrier, XLA flips the kernel once before a loop over PGD's steps, not
    # in each of them.
    flipped = lax.optimization_barrier(jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    around = []
    for axis, (low, _) in enumerate(padding):
        before = window[axis] - 1 - low
        spread = (cotangent.shape[axis + 1] - 1) * strides[axis] + 1
        after = images.shape[axis + 1] + window[axis] - 1 - spread - before
        around.append((before, after))
    image_gradient = _plain(cotangent, flipped, (1, 1), around, lhs_dilation=strides)
    made = kernel_gradient(images, cotangent, window, strides, padding)
    return image_gradient, made.astype(kernel.dtype)


_conv.defvjp(_forward, _backward)
