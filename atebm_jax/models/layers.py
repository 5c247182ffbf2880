"""Layers shared by the families: convolution, pooling and normalisation, NHWC.

Compute dtype and parameter dtype differ: parameters and normalisation are float32,
convolutions run in `dtype` (float32 or bfloat16).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from atebm_jax.errors import UserError
from atebm_jax.models import cpu
from atebm_jax.models.cpu.windows import Padding


def conv(
    images: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Padding,
    groups: int = 1,
) -> jax.Array:
    """2-D convolution.

    On CPU it has reverse-mode derivatives only, of any order.

    Args:
      images: [B, H, W, I].
      kernel: [h, w, I / groups, O], of the same dtype.
      strides: (vertical, horizontal).
      padding: ((top, bottom), (left, right)) zeros.
      groups: number of channel groups.

    Returns:
      [B, H', W', O].
    """
    if cpu.in_use():
        return cpu.conv(images, kernel, strides, padding, groups)
    return lax.conv_general_dilated(
        images,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def max_pool(images: jax.Array, side: int, stride: int, padding: int) -> jax.Array:
    """Maxima of square windows [B, H, W, C] -> [B, H', W', C].

    Args:
      images: [B, H, W, C] float.
      side, stride, padding: of the windows, the same in both directions.
    """
    window, strides = (side, side), (stride, stride)
    around = ((padding, padding), (padding, padding))
    pool = cpu.max_pool if cpu.in_use() else nn.max_pool
    return pool(images, window, strides, around)


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x Phi(x) (Hendrycks and Gimpel, 2016).

    By erf, as in PyTorch. JAX's own uses erfc, which on CPU costs half as much again.
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
    """2-D convolution with zero padding, the same in both directions.

    Attributes:
      features: output channels.
      kernel_size: side of the square window.
      stride: the same in both directions.
      padding: zeros on every side, or (zeros above and left, zeros below and right).
      groups: channel groups.
      use_bias: adds a learned vector.
      dtype: compute dtype; the parameters are float32.
      kernel_init: by default He et al. (2015) by the number of outputs, as WideResNets
        are initialised.
    """

    features: int
    kernel_size: int
    stride: int = 1
    padding: int | tuple[int, int] = 0
    groups: int = 1
    use_bias: bool = False
    dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.variance_scaling(
        2.0, "fan_out", "normal"
    )

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        window = (self.kernel_size, self.kernel_size)
        shape = (*window, images.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        around = self.padding
        if isinstance(around, int):
            around = (around, around)
        x = conv(
            images.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            (around, around),
            self.groups,
        )
        if not self.use_bias:
            return x
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return x + bias.astype(self.dtype)[None, None, None, :]


def padding_3x3(stride: int, same: bool) -> int | tuple[int, int]:
    """Zeros around what a 3x3 convolution sees.

    Args:
      stride: 1 or 2.
      same: at stride 2, pad below and on the right alone. Networks that were first
        written for TensorFlow or Haiku do so ("SAME", for even sides).
    """
    return (0, 1) if same and stride == 2 else 1


def check_sides(images: jax.Array, halvings: int) -> None:
    """Refuses images that padding as of `padding_3x3(2, same=True)` does not fit.

    At odd sides a 3x3 convolution makes one pixel less than the 1x1 beside it.

    Raises:
      UserError: sides that cannot be halved so often.
    """
    sides = images.shape[1:3]
    if any(side % 2**halvings for side in sides):
        raise UserError(
            f"image_shape begins with {sides}: both sides must be multiples of "
            f"{2**halvings} for a network that pads as DeepMind's do."
        )


class SqueezeExcitation(nn.Module):
    """Scales channels by gates that their means over the image open (Hu et al., 2018).

    Attributes:
      features: channels between the two layers.
      dtype: compute dtype of the layers.
    """

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = partial(Conv, kernel_size=1, use_bias=True, dtype=self.dtype)
        gates = at_least_float32(x).mean(axis=(1, 2), keepdims=True)
        gates = nn.relu(dense(self.features, name="fc1")(gates))
        gates = dense(x.shape[-1], name="fc2")(gates)
        return x * nn.sigmoid(at_least_float32(gates)).astype(x.dtype)


def at_least_float32(x: jax.Array) -> jax.Array:
    """The array in float32, or as it is where that is finer."""
    return x.astype(np.promote_types(x.dtype, np.float32))


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


class MeanSparse(nn.Module):
    """Values close to their channel's mean become the mean (Amini et al., 2024).

    Close is less than `threshold` standard deviations away. Statistics and threshold
    are constants of a published network: training here leaves them alone, and a new
    network has threshold 0, which changes nothing.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> the same shape and dtype."""
        wide = at_least_float32(x)

        def constant(name: str, shape: tuple[int, ...]) -> jax.Array:
            made = self.variable("batch_stats", name, jnp.zeros, shape, jnp.float32)
            return made.value.astype(wide.dtype)

        mean, var = constant("mean", x.shape[-1:]), constant("var", x.shape[-1:])
        distance = constant("threshold", ()) * jnp.sqrt(var)
        mean, distance = (jnp.broadcast_to(v, x.shape) for v in (mean, distance))
        return jnp.where(jnp.abs(wide - mean) < distance, mean.astype(x.dtype), x)


def sparsified(x: jax.Array, name: str, layer: Any) -> jax.Array:
    """The activations, after a `MeanSparse` of this name where `layer.sparse` is."""
    return MeanSparse(name=name)(x) if layer.sparse else x


def layer_norm(x: jax.Array, name: str, epsilon: float = 1e-6) -> jax.Array:
    """Layer normalisation over the last axis, in float32 at least.

    Call it inside a module's compact method, under a name of its own.
    """
    x = at_least_float32(x)
    return nn.LayerNorm(epsilon, dtype=x.dtype, use_fast_variance=False, name=name)(x)


#: Of every convolution and dense layer of ConvNeXts and transformers.
INIT = nn.initializers.truncated_normal(0.02)

#: Query, key and value [..., tokens, heads, channels a head] -> the same shape.
AttendFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def self_attention(
    x: jax.Array,
    heads: int,
    dtype: Any,
    attend: AttendFn = jax.nn.dot_product_attention,
) -> jax.Array:
    """Dense layers "qkv" and "proj" around attention [..., tokens, channels].

    Call it once inside a module's compact method.

    Args:
      x: [..., tokens, channels].
      heads: their number, which divides the channels.
      dtype: compute dtype.
      attend: makes the values of each token from those of others.

    Returns:
      [..., tokens, channels], in float32 at least.
    """
    channels = x.shape[-1]
    dense = partial(nn.Dense, dtype=dtype, kernel_init=INIT)
    # Query, key and value follow one another, each as [heads, channels a head].
    y = dense(3 * channels, name="qkv")(x)
    y = y.reshape(*x.shape[:-1], 3, heads, channels // heads)
    y = attend(*jnp.unstack(y, axis=-3)).reshape(x.shape)
    return at_least_float32(dense(channels, name="proj")(y))


def mlp(
    x: jax.Array, dtype: Any, activation: Callable[[jax.Array], jax.Array] = gelu
) -> jax.Array:
    """Dense layers "fc1" and "fc2", four times as wide between, with an activation.

    Call it once inside a module's compact method. The result, [..., channels] as the
    input, is in float32 at least.
    """
    channels = x.shape[-1]
    dense = partial(nn.Dense, dtype=dtype, kernel_init=INIT)
    y = activation(dense(4 * channels, name="fc1")(x))
    return at_least_float32(dense(channels, name="fc2")(y))


def normalize(
    images: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
    """(x - mean) / std per channel, inside the network so that attacks see pixels.

    Args:
      images: [B, H, W, C] float in [0, 1].
      mean, std: one number a channel, in pixels.

    Raises:
      UserError: not one number a channel.
    """
    if not len(mean) == len(std) == images.shape[-1]:
        raise UserError(
            f"model.mean has {len(mean)} and model.std {len(std)} numbers for images "
            f"of {images.shape[-1]} channels: give one a channel."
        )
    centre, scale = (
        jnp.asarray(x, images.dtype)[None, None, None] for x in (mean, std)
    )
    return (images - centre) / scale


def standardize(images: jax.Array) -> jax.Array:
    """Each image minus its own mean, by its own standard deviation, all channels alike.

    The deviation is that of a sample (n - 1) and at least 1 / sqrt(n), for an image of
    one colour; n = H W C.

    Args:
      images: [B, H, W, C] float in [0, 1].
    """
    count = math.prod(images.shape[1:])
    x = images - images.mean(axis=(1, 2, 3), keepdims=True)
    variance = jnp.square(x).sum(axis=(1, 2, 3), keepdims=True) / max(count - 1, 1)
    return x * lax.rsqrt(jnp.maximum(variance, 1 / count))
