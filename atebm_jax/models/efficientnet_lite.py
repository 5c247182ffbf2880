"""EfficientNet-Lite0 (Tan and Le, 2019, without gates), which scores and judges images.

Trained on ImageNet by its authors; 75.1 % top-1 by their figures. Evaluation mode only.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from atebm_jax.models.bilinear import resized
from atebm_jax.models.layers import Conv

SIDE = 224
NUM_CLASSES = 1000
_STEM, _HEAD = 32, 1280


class Stage(NamedTuple):
    """Blocks of one size; the first one has the stride and changes the channels."""

    blocks: int
    side: int  # of the depthwise window
    stride: int
    expansion: int  # channels inside by channels that come in
    features: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class _ConvNorm(nn.Module):
    """Convolution, padded as TensorFlow does for even sides, and normalisation."""

    features: int
    side: int = 1
    stride: int = 1
    groups: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        padding = ((self.side - self.stride) // 2, (self.side - 1) // 2)
        size = (self.features, self.side, self.stride, padding, self.groups)
        y = Conv(*size, dtype=self.dtype, name="conv")(x)
        return nn.BatchNorm(True, epsilon=1e-3, name="bn")(y)


class _Block(nn.Module):
    """Inverted bottleneck: wider, depthwise, narrow again; a shortcut where it fits."""

    side: int
    stride: int
    expansion: int
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv_norm = partial(_ConvNorm, dtype=self.dtype)
        inside, y = x.shape[-1] * self.expansion, x
        if self.expansion > 1:
            y = nn.relu6(conv_norm(inside, name="expand")(y))
        depthwise = (inside, self.side, self.stride, inside)
        y = nn.relu6(conv_norm(*depthwise, name="depthwise")(y))
        y = conv_norm(self.features, name="project")(y)
        return x + y if x.shape == y.shape else y


class Outputs(NamedTuple):
    """Pooled features [B, 1280] and logits [B, 1000]."""

    features: jax.Array
    logits: jax.Array


class EfficientNetLite0(nn.Module):
    """Images [B, 224, 224, 3] as of `inputs` to `Outputs`; convolves in `dtype`."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> Outputs:
        conv_norm = partial(_ConvNorm, dtype=self.dtype)
        x = nn.relu6(conv_norm(_STEM, 3, 2, name="stem")(x))
        number = 0
        for stage in STAGES:
            for index in range(stage.blocks):
                size = (stage.side, 1 if index else stage.stride, *stage[3:])
                x = _Block(*size, self.dtype, name=f"block{number}")(x)
                number += 1
        x = nn.relu6(conv_norm(_HEAD, name="head")(x))
        features = x.mean(axis=(1, 2))
        return Outputs(features, nn.Dense(NUM_CLASSES, name="fc")(features))


def inputs(images: jax.Array) -> jax.Array:
    """Images [B, H, W, 3] float32 in [0, 1] -> what the network sees.

    The whole image, resized bilinearly; bytes as (u8 - 127) / 128. The authors cut the
    middle 87.5 % out of photographs before: that is a data set's preprocessing here.
    """
    return (resized(images, SIDE) * 255.0 - 127.0) / 128.0


# Our module in a block or beside the blocks -> PyTorch's convolution and normalisation.
_TORCH = {
    "stem": ("_conv_stem", "_bn0"),
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
    "head": ("_conv_head", "_bn1"),
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_LEAVES |= {"mean": "running_mean", "var": "running_var"}


def torch_name(keys: list[str]) -> str:
    """The PyTorch port's name of our parameter at a path."""
    *blocks, module, leaf = keys
    if module == "fc":
        return f"_fc.{_LEAVES[leaf]}"
    *blocks, owner = blocks
    prefix = f"_blocks.{blocks[0].removeprefix('block')}." if blocks else ""
    conv, norm = _TORCH[owner]
    return f"{prefix}{conv if module == 'conv' else norm}.{_LEAVES[leaf]}"
