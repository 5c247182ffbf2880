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
from atebm_jax.models import cpu, forms

# From so many pixels a side on, `_from_memory` shortens a TPU's depthwise convolutions:
# with ConvNeXt's 7 it does, with XCiT's 3 it does not.
_WIDE_WINDOW = 7


def conv(
    images: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: cpu.Padding,
    groups: int = 1,
) -> jax.Array:
    """2-D convolution.

    It has reverse-mode derivatives only, of any order.

    Args:
      images: [B, H, W, I].
      kernel: [h, w, I / groups, O], of the same dtype.
      strides: (vertical, horizontal).
      padding: ((top, bottom), (left, right)) zeros.
      groups: number of channel groups.

    Returns:
      [B, H', W', O].
    """
    ours = partial(cpu.conv, strides=strides, padding=padding, groups=groups)
    theirs = partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    if groups > 1 and min(kernel.shape[:2]) >= _WIDE_WINDOW:
        theirs = partial(_from_memory, theirs)
    return forms.either(ours, theirs, images, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _from_memory(form: forms.Form, images: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution that reads its images, and in reverse its gradient, from memory.

    Otherwise a TPU's compiler makes each pixel again, its norm or that norm's
    derivative, in every tile of the result whose windows reach it. The derivative of a
    barrier alone would stand behind the gradient of the images, where a sum along the
    block can still be fused.
    """
    return form(lax.optimization_barrier(images), kernel)


def _from_memory_forward(
    form: forms.Form, images: jax.Array, kernel: jax.Array
) -> tuple[Any, Any]:
    return jax.vjp(form, lax.optimization_barrier(images), kernel)


def _from_memory_backward(form: forms.Form, pullback: Any, gradient: jax.Array) -> Any:
    return pullback(lax.optimization_barrier(gradient))


_from_memory.defvjp(_from_memory_forward, _from_memory_backward)


def max_pool(images: jax.Array, side: int, stride: int, padding: int) -> jax.Array:
    """Maxima of square windows [B, H, W, C] -> [B, H', W', C].

    Args:
      images: [B, H, W, C] float.
      side, stride, padding: of the windows, the same in both directions.
    """
    window, strides = (side, side), (stride, stride)
    around = ((padding, padding), (padding, padding))
    ours = lambda x: cpu.max_pool(x, window, strides, around)
    theirs = lambda x: nn.max_pool(x, window, strides, around)
    return forms.either(ours, theirs, images)


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), whose derivative reads the result alone: x need not be kept.

    It asks for y != 0, as XLA turns y > 0 back into x > 0.
    """
    return jnp.maximum(x, jnp.zeros((), x.dtype))


@relu.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[Any, Any]:
    y = relu(*primals)
    return y, jnp.where(y != 0, *tangents, jnp.zeros((), y.dtype))


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x Phi(x) (Hendrycks and Gimpel, 2016).

    By erf, as in PyTorch. JAX's own uses erfc, which on CPU costs half as much again.
    """
    wide = at_least_float32(x)
    return (wide * (0.5 + 0.5 * lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def swish(x: jax.Array) -> jax.Array:
    """x sigmoid(x), rounded once as `gelu` is."""
    return nn.swish(at_least_float32(x)).astype(x.dtype)


#: What `config.model.activation` may be; PyTorch calls swish SiLU.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": relu,
    "swish": swish,
    "gelu": gelu,
}


#: Collection of what layers make of their weights alone, before any loop.
FROZEN = "frozen"


def prepared(layer: nn.Module, make: Callable[[], Any]) -> Any:
    """What a layer makes of its weights alone, or what was made of them before.

    Call it once in a layer. Where the collection `FROZEN` is mutable, the layer leaves
    there what it made; where it has something, the layer's weights are not looked at.

    Args:
      layer: a bound module.
      make: () -> tree of arrays.
    """
    if layer.is_initializing():
        return make()
    if layer.has_variable(FROZEN, "weights"):
        return layer.get_variable(FROZEN, "weights")
    made = make()
    if layer.is_mutable_collection(FROZEN):
        layer.put_variable(FROZEN, "weights", made)
    return made


def per_channel(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector [C] with the rank of an array [..., C]."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


#: () -> (scale, shift), [C] each, of the map scale * x + shift.
AffineFn = Callable[[], tuple[jax.Array, jax.Array]]


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
    def __call__(self, images: jax.Array, then: AffineFn | None = None) -> jax.Array:
        """[B, H, W, I] -> [B, H', W', features] in the compute dtype.

        Args:
          images: of any float dtype.
          then: an affine map of the result, folded into kernel and bias. The result is
            then float32 at least, as the map's would be.
        """
        window = (self.kernel_size, self.kernel_size)
        shape = (*window, images.shape[-1] // self.groups, self.features)

        def weights() -> tuple[jax.Array, jax.Array | None]:
            kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
            bias = None
            if self.use_bias:
                zeros = nn.initializers.zeros
                bias = self.param("bias", zeros, (self.features,), jnp.float32)
            if then is not None:
                scale, shift = then()
                kernel = kernel * per_channel(scale, kernel)
                bias = shift if bias is None else bias * scale + shift
            elif bias is not None:
                bias = bias.astype(self.dtype)
            return kernel.astype(self.dtype), bias

        kernel, bias = prepared(self, weights)
        around = self.padding
        if isinstance(around, int):
            around = (around, around)
        x = conv(
            images.astype(self.dtype),
            kernel,
            (self.stride, self.stride),
            (around, around),
            self.groups,
        )
        if bias is None:
            return x
        return x.astype(bias.dtype) + per_channel(bias, x)


def check_sides(images: jax.Array, unit: int, what: str) -> None:
    """Refuses images [B, H, W, C] whose sides are no multiples of so many pixels.

    `what` says which networks need them, for the message: "a ViT".

    Raises:
      UserError: other sides.
    """
    sides = images.shape[1:3]
    if any(side % unit for side in sides):
        raise UserError(
            f"image_shape begins with {sides}: both sides must be multiples of {unit} "
            f"pixels for {what}."
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
        gates = relu(dense(self.features, name="fc1")(gates))
        gates = dense(x.shape[-1], name="fc2")(gates)
        return x * nn.sigmoid(at_least_float32(gates)).astype(x.dtype)


def at_least_float32(x: jax.Array) -> jax.Array:
    """The array in float32, or as it is where that is finer."""
    return x.astype(np.promote_types(x.dtype, np.float32))


def unit(x: jax.Array, axis: int = -1) -> jax.Array:
    """Vectors along an axis, scaled to length one, in float32 at least.

    Shorter ones than 1e-12 stay shorter, as in PyTorch.
    """
    x = at_least_float32(x)
    square = jnp.square(x).sum(axis=axis, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, 1e-24))


class BatchNorm(nn.BatchNorm):
    """Batch normalisation whose evaluation mode is one multiply-add a channel."""

    def affine(self) -> tuple[jax.Array, jax.Array]:
        """Scale and shift of the evaluation mode, [C] each."""
        weights = self.variables["params"]
        statistics = self.variables["batch_stats"]
        scale = weights["scale"] * lax.rsqrt(statistics["var"] + self.epsilon)
        return scale, weights["bias"] - statistics["mean"] * scale

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """[..., C] -> [..., C], float32 at least."""
        x = at_least_float32(x)
        if not self.use_running_average or self.is_initializing():
            return super().__call__(x)
        scale, shift = prepared(self, self.affine)
        return x * per_channel(scale, x) + per_channel(shift, x)


def batch_norm(name: str, train: bool) -> BatchNorm:
    """Batch normalisation, eps 1e-5, statistics averaged with weight 0.1.

    `train=False` uses the running statistics and leaves them alone: that is both the
    evaluation mode and the frozen mode of stage 2. In training the statistics are
    those of the whole global batch, and the running variance averages the biased
    batch variance (PyTorch: unbiased, a relative difference of 1/(B H W - 1)).
    """
    return BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
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

        def interval() -> tuple[jax.Array, jax.Array, jax.Array]:
            mean, var = constant("mean", x.shape[-1:]), constant("var", x.shape[-1:])
            distance = constant("threshold", ()) * jnp.sqrt(var)
            return mean, mean.astype(x.dtype), distance

        mean, rounded, distance = (per_channel(v, x) for v in prepared(self, interval))
        return jnp.where(jnp.abs(wide - mean) < distance, rounded, x)


def normed(conv: Conv, norm: BatchNorm, images: jax.Array) -> jax.Array:
    """norm(conv(images)), float32 at least; in evaluation mode as one convolution.

    Args:
      conv, norm: layers of the calling module.
      images: [B, H, W, I].
    """
    if not norm.use_running_average or norm.is_initializing():
        return norm(conv(images))
    return conv(images, norm.affine)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, in float32 at least."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> [..., C], float32 at least."""
        features = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, features, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, features, jnp.float32)
        x = standardized(x, self.epsilon)
        return x * per_channel(scale, x) + per_channel(bias, x)

    def affine(self) -> tuple[jax.Array, jax.Array]:
        """Scale and shift after the standardisation, [C] each."""
        return self.get_variable("params", "scale"), self.get_variable("params", "bias")


def sparsified(x: jax.Array, name: str, layer: Any) -> jax.Array:
    """The activations, after a `MeanSparse` of this name where `layer.sparse` is."""
    return MeanSparse(name=name)(x) if layer.sparse else x


def layer_norm(x: jax.Array, name: str, epsilon: float = 1e-6) -> jax.Array:
    """A `LayerNorm` of this name in the calling module, applied."""
    return LayerNorm(epsilon, name=name)(x)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def standardized(x: jax.Array, epsilon: float) -> jax.Array:
    """Mean 0 and variance 1 over the last axis, in float32 at least.

    Its derivative is written out, so that one pass takes both of its means.
    """
    return _standardized(x, epsilon)[0]


def _standardized(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """`standardized`, and its factor 1 / sqrt(variance + epsilon)."""
    x = at_least_float32(x)
    x = x - _mean(x)
    scale = lax.rsqrt(_mean(jnp.square(x)) + epsilon)
    return x * scale, scale


def _mean(x: jax.Array) -> jax.Array:
    return x.mean(axis=-1, keepdims=True)


@standardized.defjvp
def _(epsilon: float, primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    y, scale = _standardized(*primals, epsilon)
    dx = at_least_float32(*tangents)
    return y, scale * (dx - _mean(dx) - y * _mean(y * dx))


class Dense(nn.Module):
    """x @ kernel + bias over the last axis.

    Attributes:
      features: outputs.
      use_bias: adds a learned vector.
      dtype: compute dtype; None for that of the input, float32 at least. The parameters
        are float32.
      kernel_init: of the kernel; the bias begins at zero.
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        after: AffineFn | None = None,
        then: Callable[[], jax.Array] | None = None,
    ) -> jax.Array:
        """[..., I] -> [..., features].

        Args:
          x: of any float dtype.
          after: an affine map of the inputs, folded into kernel and bias.
          then: () -> factors [features] of the result, folded likewise.
        """

        dtype = at_least_float32(x).dtype if self.dtype is None else self.dtype

        def weights() -> tuple[jax.Array, jax.Array]:
            shape = (x.shape[-1], self.features)
            kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
            zeros, bias = nn.initializers.zeros, jnp.zeros(self.features)
            if self.use_bias:
                bias = self.param("bias", zeros, (self.features,), jnp.float32)
            if after is not None:
                scale, shift = after()
                bias = bias + shift @ kernel
                kernel = scale[:, None] * kernel
            if then is not None:
                factors = then()
                kernel, bias = kernel * factors[None], bias * factors
            return kernel.astype(dtype), bias.astype(dtype)

        kernel, bias = prepared(self, weights)
        y = x.astype(dtype) @ kernel
        return y + per_channel(bias, y)


def dense_after(norm: LayerNorm | None, dense: Dense, x: jax.Array) -> jax.Array:
    """dense(norm(x)), with the norm's scale and shift in the dense layer's weights.

    Args:
      norm, dense: layers of the calling module; no norm for dense(x).
      x: [..., I].
    """
    if norm is None:
        return dense(x)
    if dense.is_initializing():
        return dense(norm(x))
    return dense(standardized(x, norm.epsilon), after=norm.affine)


#: Of every convolution and dense layer of ConvNeXts and transformers.
INIT = nn.initializers.truncated_normal(0.02)

#: Query, key and value [..., tokens, heads, channels a head] -> the same shape.
AttendFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def self_attention(
    x: jax.Array,
    heads: int,
    dtype: Any,
    attend: AttendFn = jax.nn.dot_product_attention,
    norm: LayerNorm | None = None,
) -> jax.Array:
    """Dense layers "qkv" and "proj" around attention [..., tokens, channels].

    Call it once inside a module's compact method.

    Args:
      x: [..., tokens, channels].
      heads: their number, which divides the channels.
      dtype: compute dtype.
      attend: makes the values of each token from those of others.
      norm: before it.

    Returns:
      [..., tokens, channels], in float32 at least.
    """
    channels = x.shape[-1]
    dense = partial(Dense, dtype=dtype, kernel_init=INIT)
    # Query, key and value follow one another, each as [heads, channels a head].
    y = dense_after(norm, dense(3 * channels, name="qkv"), x)
    y = y.reshape(*x.shape[:-1], 3, heads, channels // heads)
    y = attend(*jnp.unstack(y, axis=-3)).reshape(x.shape)
    return at_least_float32(dense(channels, name="proj")(y))


def mlp(
    x: jax.Array,
    dtype: Any,
    norm: LayerNorm | None = None,
    scale: Callable[[], jax.Array] | None = None,
    activation: Callable[[jax.Array], jax.Array] = gelu,
) -> jax.Array:
    """Dense layers "fc1" and "fc2", four times as wide between, with an activation.

    Call it once inside a module's compact method. The result, [..., channels] as the
    input, is in float32 at least.

    Args:
      x: [..., channels].
      dtype: compute dtype.
      norm: before it.
      scale: () -> factors [channels] of the result.
      activation: between the layers.
    """
    channels = x.shape[-1]
    dense = partial(Dense, dtype=dtype, kernel_init=INIT)
    y = activation(dense_after(norm, dense(4 * channels, name="fc1"), x))
    return at_least_float32(dense(channels, name="fc2")(y, then=scale))


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
