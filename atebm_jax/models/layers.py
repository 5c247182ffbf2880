"""Layers shared by the families: convolution and batch normalisation, NHWC.

Compute dtype and parameter dtype are apart: parameters and normalisation are float32,
convolutions run in `dtype` (float32 or bfloat16).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from atebm_jax.errors import UserError
from atebm_jax.models.kernel_gradient import kernel_gradient
from atebm_jax.models.narrow import conv_narrow, widened, windows_at_once
from atebm_jax.models.products import (
    SMALL_MATRIX,
    Padding,
    conv_patches,
    conv_tiles,
    conv_whole,
    max_pool_shifted,
    multiply,
)

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv_xla(
    images: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Padding,
    groups: int = 1,
) -> jax.Array:
    """2-D convolution with XLA's own gradients.

    Args:
      images: [B, H, W, I].
      kernel: [h, w, I / groups, O], of the same dtype.
      strides: (vertical, horizontal).
      padding: ((top, bottom), (left, right)) zeros.
      groups: number of channel groups.

    Returns:
      [B, H', W', O].
    """
    return lax.conv_general_dilated(
        images,
        kernel,
        strides,
        padding,
        dimension_numbers=_DIMENSIONS,
        feature_group_count=groups,
    )


def conv_forward_gradient(
    images: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Padding,
    groups: int = 1,
    joined: bool = False,
) -> jax.Array:
    """`conv_xla` in the form whose gradients are fast on CPU.

    Windows that do not overlap make a plain matrix product. So do patches, where the
    window has more elements than the image: XLA would swap the two and convolve the
    kernel with the images, hundreds of times slower. Where the image has no more
    pixels than the window, and few channels, a matrix for the whole of it is less work
    still. Every other convolution has an image gradient that is itself a plain
    convolution. With `joined`, several windows at once where there are few
    outputs. Arguments otherwise as `conv_xla`; reverse-mode derivatives only, of any
    order.
    """
    window = kernel.shape[:2]
    apart = window[0] <= strides[0] and window[1] <= strides[1]
    if groups == 1 and apart and padding == ((0, 0), (0, 0)):
        return conv_tiles(images, kernel, strides)
    if groups == 1 and math.prod(window) > _smallest(images, window, strides, padding):
        pixels = math.prod(images.shape[1:3])
        numbers = pixels**2 * kernel.shape[2] * kernel.shape[3]
        if pixels <= math.prod(window) and numbers <= SMALL_MATRIX:
            return conv_whole(images, kernel, strides, padding)
        return conv_patches(images, kernel, strides, padding)
    return _conv(images, kernel, strides, padding, groups, joined)


def _smallest(
    images: jax.Array,
    window: tuple[int, ...],
    strides: tuple[int, int],
    padding: Padding,
) -> int:
    """Pixels of the images or of the result, whichever are fewer."""
    sizes = images.shape[1:3]
    made = [
        (size + sum(edges) - side) // stride + 1
        for size, edges, side, stride in zip(
            sizes, padding, window, strides, strict=True
        )
    ]
    return min(math.prod(sizes), math.prod(made))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _conv(
    images: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Padding,
    groups: int,
    joined: bool,
) -> jax.Array:
    """`conv_xla` whose image gradient is itself written as a plain convolution.

    XLA expresses the image gradient with permuted dimension numbers. On CPU such a
    convolution is slow inside a loop body, where it is not put into the canonical
    layout. Flipping and transposing the kernel ourselves gives the canonical layout
    everywhere. The kernel gradient is made of products, but for several groups, where
    it is XLA's.
    """
    return _value(images, kernel, strides, padding, groups, joined)


def _value(
    images: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Padding,
    groups: int,
    joined: bool,
) -> jax.Array:
    """`conv_xla`; joined, several windows at once where there are few outputs."""
    if joined and strides == (1, 1):
        count = windows_at_once(images, kernel, padding, groups)
        if count > 1:
            wide = outside_loops(widened(kernel, count))
            return conv_narrow(images, wide, count, padding)
    return conv_xla(images, kernel, strides, padding, groups)


def _conv_fwd(
    images: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Padding,
    groups: int,
    joined: bool,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _value(images, kernel, strides, padding, groups, joined), (images, kernel)


def _conv_bwd(
    strides: tuple[int, int],
    padding: Padding,
    groups: int,
    joined: bool,
    residuals: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    images, kernel = residuals
    height, width, per_group, features = kernel.shape
    # [h, w, I/g, O] -> flipped [h, w, O/g, I]: inputs and outputs of each group swap.
    flipped = jnp.flip(kernel, (0, 1))
    flipped = flipped.reshape(height, width, per_group, groups, features // groups)
    flipped = flipped.transpose(0, 1, 4, 3, 2)
    flipped = flipped.reshape(height, width, features // groups, groups * per_group)
    flipped = outside_loops(flipped)
    top_bottom, left_right = (
        _transposed_padding(*axis)
        for axis in zip(
            images.shape[1:3],
            cotangent.shape[1:3],
            (height, width),
            strides,
            padding,
            strict=True,
        )
    )
    if strides == (1, 1):
        image_gradient = _value(
            cotangent, flipped, strides, (top_bottom, left_right), groups, joined
        )
    else:
        image_gradient = lax.conv_general_dilated(
            cotangent,
            flipped,
            window_strides=(1, 1),
            padding=(top_bottom, left_right),
            lhs_dilation=strides,
            dimension_numbers=_DIMENSIONS,
            feature_group_count=groups,
        )
    if groups == 1:
        window = (height, width)
        made = kernel_gradient(images, cotangent, window, strides, padding)
        return image_gradient, made.astype(kernel.dtype)
    _, kernel_pullback = jax.vjp(
        lambda k: conv_xla(images, k, strides, padding, groups), kernel
    )
    return image_gradient, kernel_pullback(cotangent)[0]


def outside_loops(x: jax.Array) -> jax.Array:
    """The array itself; where it is a constant of a loop, XLA computes it before.

    A mere transposition or selection of parameters it would do again in every step of
    PGD.
    """
    return lax.optimization_barrier(x)


def _transposed_padding(
    size: int, out_size: int, window: int, stride: int, padding: tuple[int, int]
) -> tuple[int, int]:
    low = window - 1 - padding[0]
    dilated = (out_size - 1) * stride + 1
    return low, size - dilated + window - 1 - low


_conv.defvjp(_conv_fwd, _conv_bwd)

CONV_GRADIENTS: dict[str, Callable[..., jax.Array]] = {
    "xla": conv_xla,
    "forward": conv_forward_gradient,
    "joined": partial(conv_forward_gradient, joined=True),
}


def chosen_form(conv_gradient: str) -> str:
    """The form of convolutions and pooling for a `conv_gradient` setting.

    Args:
      conv_gradient: "xla", "forward", or "auto": "forward" on CPU, where it was
        measured to be faster (`benchmarks/step.py`), "xla" elsewhere. "joined" is
        "forward" with neighbouring windows of few outputs at once (`models.narrow`):
        faster still for narrow networks on CPU, sums in another order.

    Returns:
      A key of `CONV_GRADIENTS`.

    Raises:
      UserError: any other value.
    """
    if conv_gradient == "auto":
        conv_gradient = "forward" if jax.default_backend() == "cpu" else "xla"
    if conv_gradient not in CONV_GRADIENTS:
        raise UserError(
            f"unknown conv_gradient {conv_gradient!r}: choose one of auto, "
            f"{', '.join(CONV_GRADIENTS)}."
        )
    return conv_gradient


def conv_function(conv_gradient: str) -> Callable[..., jax.Array]:
    """The convolution for a setting as in `chosen_form`.

    Raises:
      UserError: an unknown one.
    """
    return CONV_GRADIENTS[chosen_form(conv_gradient)]


def dense_product(conv_gradient: str) -> Callable[..., jax.Array]:
    """What `nn.Dense` multiplies by, for a setting.

    Args:
      conv_gradient: as in `chosen_form`; all but "xla" use `products.multiply`, which
        has no forward-mode derivative and no other precision than the default.

    Returns:
      A `dot_general` for rows and matrix.

    Raises:
      UserError: an unknown one.
    """
    if chosen_form(conv_gradient) == "xla":
        return lax.dot_general

    def dot_general(
        rows: jax.Array,
        matrix: jax.Array,
        dimension_numbers: Any,
        precision: None = None,
        **_: Any,
    ) -> jax.Array:
        del dimension_numbers
        if precision is not None:
            raise ValueError(f"precision is {precision}: only the default is known.")
        return multiply(rows, matrix)

    return dot_general


def max_pool(
    images: jax.Array, side: int, stride: int, padding: int, conv_gradient: str
) -> jax.Array:
    """Maxima of square windows [B, H, W, C] -> [B, H', W', C].

    Args:
      images: [B, H, W, C] float.
      side, stride, padding: of the windows, the same in both directions.
      conv_gradient: as in `chosen_form`. XLA's gradient is slow on CPU.
    """
    window, strides = (side, side), (stride, stride)
    pad = ((padding, padding), (padding, padding))
    if chosen_form(conv_gradient) != "xla":
        return max_pool_shifted(images, window, strides, pad)
    return nn.max_pool(images, window, strides, pad)


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x Phi(x) (Hendrycks and Gimpel, 2016).

    By erf, as PyTorch has it; JAX's own goes by erfc, which on CPU costs half as much
    again.
    """
    wide = at_least_float32(x)
    return (wide * (0.5 + 0.5 * lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


#: What `config.model.activation` may be; PyTorch calls swish SiLU.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "swish": nn.swish,
    "gelu": gelu,
}


class Conv(nn.Module):
    """2-D convolution with symmetric zero padding, NHWC.

    Attributes:
      features: output channels.
      kernel_size: side of the square window.
      stride: the same in both directions.
      padding: zeros on every side.
      groups: channel groups.
      use_bias: adds a learned vector.
      dtype: compute dtype; the parameters are float32.
      conv_gradient: see `chosen_form`.
    """

    features: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    use_bias: bool = False
    dtype: Any = jnp.float32
    conv_gradient: str = "auto"
    # He et al. (2015) by the number of outputs, as WideResNets are initialised.
    kernel_init: nn.initializers.Initializer = nn.initializers.variance_scaling(
        2.0, "fan_out", "normal"
    )

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        shape = (
            self.kernel_size,
            self.kernel_size,
            images.shape[-1] // self.groups,
            self.features,
        )
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        pad = (self.padding, self.padding)
        x = conv_function(self.conv_gradient)(
            images.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            (pad, pad),
            self.groups,
        )
        if self.use_bias:
            bias = self.param(
                "bias", nn.initializers.zeros, (self.features,), jnp.float32
            )
            x = x + bias.astype(self.dtype)[None, None, None, :]
        return x


def at_least_float32(x: jax.Array) -> jax.Array:
    """The array in float32, or as it is where that is finer."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def batch_norm(name: str, train: bool) -> nn.BatchNorm:
    """Batch normalisation in float32, eps 1e-5, statistics averaged with weight 0.1.

    `train=False` uses the running statistics and leaves them alone: that is both the
    evaluation mode and the frozen mode of stage 2. In training the statistics are
    those of the whole global batch, and the running variance averages the biased
    batch variance (PyTorch: unbiased, a relative difference of 1/(B H W - 1)).
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=jnp.float32,
        use_fast_variance=False,
        name=name,
    )


def layer_norm(x: jax.Array, name: str) -> jax.Array:
    """Layer normalisation over the last axis, eps 1e-6, in float32 at least.

    To be called inside a module's compact method, under a name of its own.
    """
    x = at_least_float32(x)
    return nn.LayerNorm(1e-6, dtype=x.dtype, use_fast_variance=False, name=name)(x)


class Normalize(nn.Module):
    """(x - mean) / std per channel, inside the network so that attacks see pixels.

    Attributes:
      mean: one number a channel, in pixels of a [0, 1] image.
      std: one number a channel.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, images: jax.Array) -> jax.Array:
        if not len(self.mean) == len(self.std) == images.shape[-1]:
            raise UserError(
                f"model.mean has {len(self.mean)} and model.std {len(self.std)} "
                f"numbers for images of {images.shape[-1]} channels: give one a "
                "channel."
            )
        mean = jnp.asarray(self.mean, images.dtype)[None, None, None, :]
        std = jnp.asarray(self.std, images.dtype)[None, None, None, :]
        return (images - mean) / std
