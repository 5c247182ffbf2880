"""First layers of ConvNeXts and ViTs: patches, or a stack of convolutions (ConvStem).

Robust networks gain from convolutions in place of patches (Singh, Croce and Hein,
2023, Revisiting adversarial training for ImageNet).
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from atebm_jax.models.family import Rules
from atebm_jax.models.layers import Conv, gelu, layer_norm

STEMS = ("patch", "conv")

_INIT = nn.initializers.truncated_normal(0.02)


class PatchStem(nn.Module):
    """Images [B, H, W, C] to [B, H / patch, W / patch, features].

    Attributes:
      features: output channels.
      patch: side of the patches.
      norm: normalise the result.
    """

    features: int
    patch: int
    norm: bool
    dtype: Any = jnp.float32
    conv_gradient: str = "auto"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = Conv(
            self.features,
            self.patch,
            self.patch,
            use_bias=True,
            dtype=self.dtype,
            conv_gradient=self.conv_gradient,
            kernel_init=_INIT,
            name="proj",
        )(images)
        return layer_norm(x, "norm") if self.norm else x


class ConvStem(nn.Module):
    """3x3 convolutions, each with norm and GELU, then perhaps one of 1x1.

    Attributes:
      layers: (channels, stride) of each 3x3 convolution.
      features: output channels of the 1x1 convolution; 0 for none.
    """

    layers: Sequence[tuple[int, int]]
    features: int = 0
    dtype: Any = jnp.float32
    conv_gradient: str = "auto"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        conv = {"dtype": self.dtype, "conv_gradient": self.conv_gradient}
        conv |= {"use_bias": True, "kernel_init": _INIT}
        x = images
        for index, (channels, stride) in enumerate(self.layers):
            x = Conv(channels, 3, stride, 1, name=f"conv{index}", **conv)(x)
            x = layer_norm(x, f"norm{index}").astype(self.dtype)
            x = gelu(x)
        return Conv(self.features, 1, name="out", **conv)(x) if self.features else x


def conv_stem_rules(prefix: str, layers: int) -> Rules:
    """PyTorch's names: convolution, norm and activation in turn, counted through."""
    return tuple(
        (f"{prefix}.{3 * index + place}", f"stem/{part}{index}")
        for index in range(layers)
        for place, part in enumerate(("conv", "norm"))
    )
