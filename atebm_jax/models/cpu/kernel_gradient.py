"""Kernel gradients of convolutions as matrix products of few images at a time.

XLA's own copies all images into another layout first. On CPU that is slow, and by far
slower inside a loop (`benchmarks/README.md`). The shifted copies of few images, which a
product needs, stay in a core's cache.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from atebm_jax.models.cpu.windows import Padding, largest_divisor, patches

# A product takes as many images as make up to this many pixels, and at least one.
_PIXELS = 64


def kernel_gradient(
    images: jax.Array,
    cotangent: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding,
) -> jax.Array:
    """Gradient of a convolution by its kernel, [h, w, I, O], in float32 at least.

    Each device sums over its own images where a batch is split evenly over all devices,
    as `sharding.batched` does it: they exchange one sum, after the loop. Any other
    placement gives the same result with more memory or communication.

    Args:
      images: [B, H, W, I].
      cotangent: [B, H', W', O], with respect to the convolution's result.
      window: (h, w) of the kernel.
      strides, padding: of the convolution.
    """
    sums = np.promote_types(images.dtype, np.float32)
    devices, count = jax.device_count(), images.shape[0]
    # A program that is exported for batches of any size takes all images in one turn.
    known = isinstance(count, int)
    if known and count == 0:
        return jnp.zeros((*window, images.shape[-1], cotangent.shape[-1]), sums)
    shares = devices if known and count % devices == 0 else 1
    images, cotangent = (
        x.reshape(shares, count // shares, *x.shape[1:]) for x in (images, cotangent)
    )
    of_a_share, made = cotangent.shape[1], math.prod(cotangent.shape[2:4])
    few = largest_divisor(of_a_share, _PIXELS // made) if known else of_a_share

    def product(turn: jax.Array | int) -> jax.Array:
        taken, caused = (
            lax.dynamic_slice_in_dim(x, turn * few, few, axis=1).reshape(
                shares * few, *x.shape[2:]
            )
            for x in (images, cotangent)
        )
        if strides == (1, 1):
            left, right = _row_factors(taken, caused, window, padding)
        else:
            left, right = caused, patches(taken, window, strides, padding)
        return lax.dot_general(
            left.reshape(shares, -1, left.shape[-1]),
            right.reshape(shares, -1, right.shape[-1]),
            (((1,), (1,)), ((0,), (0,))),
            preferred_element_type=sums,
        )

    like = jax.eval_shape(product, 0)
    total = lax.fori_loop(
        0,
        of_a_share // few,
        lambda turn, total: total + product(turn),
        jnp.zeros(like.shape, like.dtype),
    ).sum(axis=0)
    outputs = cotangent.shape[-1]
    if strides == (1, 1):
        total = total.reshape(window[1], -1, window[0], outputs)[:, :, ::-1]
        return total.transpose(2, 0, 1, 3)
    return total.T.reshape(*window, -1, outputs)


def _row_factors(
    images: jax.Array,
    cotangent: jax.Array,
    window: tuple[int, int],
    padding: Padding,
) -> tuple[jax.Array, jax.Array]:
    """Of stride 1, fewer copies than whole windows: [N, H, W', w I], [N, H, W', h O].

    The first is what each element of a window's row sees. The second is the cotangent
    at each row of the window, the last row first.
    """
    (height, width), (top, bottom) = window, padding[0]
    seen = patches(images, (1, width), (1, 1), ((0, 0), padding[1]))
    # Row y of the images is seen by row y + top - i of the result at row i of a window.
    around = ((height - 1 - top, height - 1 - bottom), (0, 0))
    return seen, patches(cotangent, (height, 1), (1, 1), around)
