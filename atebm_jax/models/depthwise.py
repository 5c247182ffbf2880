"""Depthwise convolution: one window a channel, NHWC, stride 1, same size.

XLA's CPU convolution does depthwise windows one number at a time. Written as a sum of
shifted, scaled images it becomes one vectorised loop, forward and backward.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from atebm_jax.errors import UserError
from atebm_jax.models.layers import at_least_float32


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
    weights = at_least_float32(kernel)[:, :, 0, None, None, None, :]
    wide = at_least_float32(images)
    padded, total = _padded(wide, side), jnp.zeros_like(wide)
    for i in range(side):
        for j in range(side):
            seen = padded[:, i : i + height, j : j + width]
            total = total + seen * weights[i, j]
    return total.astype(images.dtype)


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
    height, width = images.shape[1:3]
    padded = _padded(at_least_float32(images), side)
    wide = at_least_float32(cotangent)
    sums = [
        (padded[:, i : i + height, j : j + width] * wide).sum(axis=(0, 1, 2))
        for i in range(side)
        for j in range(side)
    ]
    return jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)


depthwise_shifted.defvjp(_fwd, _bwd)

# By the names of `layers.CONV_GRADIENTS`: each setting picks one of either kind.
DEPTHWISE: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "xla": depthwise_xla,
    "forward": depthwise_shifted,
}


def depthwise_function(
    conv_gradient: str,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The depthwise convolution for a `conv_gradient` setting.

    Args:
      conv_gradient: "xla", "forward" (shifted images), or "auto": "forward" on CPU,
        "xla" elsewhere.

    Raises:
      UserError: any other value.
    """
    if conv_gradient == "auto":
        conv_gradient = "forward" if jax.default_backend() == "cpu" else "xla"
    if conv_gradient not in DEPTHWISE:
        raise UserError(
            f"unknown conv_gradient {conv_gradient!r}: choose one of auto, "
            f"{', '.join(DEPTHWISE)}."
        )
    return DEPTHWISE[conv_gradient]


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
