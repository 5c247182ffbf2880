"""First layers of ConvNeXts and transformers: patches, or convolutions (ConvStem).

A ConvStem makes networks more robust than patches do (Singh, Croce and Hein, 2023,
Revisiting adversarial training for ImageNet).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from atebm_jax.models.family import Rules
from atebm_jax.models.layers import INIT, Conv, gelu, layer_norm

STEMS = ("patch", "conv")

biased_conv = partial(Conv, use_bias=True, kernel_init=INIT)


class PatchStem(nn.Module):
    """Images [B, H, W, C] to [B, H / patch, W / patch, features].

    Attributes:
      features: output channels.
      patch: side of the patches.
      norm: normalise the result.
      epsilon: of the norm.
    """

    features: int
    patch: int
    norm: bool
    dtype: Any
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        side = self.patch
        conv = biased_conv(self.features, side, side, dtype=self.dtype, name="proj")
        x = conv(images)
        return layer_norm(x, "norm", self.epsilon) if self.norm else x


class ConvStem(nn.Module):
    """3x3 convolutions, each with norm and GELU, and optionally one of 1x1.

    Attributes:
      layers: (channels, stride) of each 3x3 convolution.
      features: output channels of the 1x1 convolution; 0 for none.
    """

    layers: Sequence[tuple[int, int]]
    dtype: Any
    features: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(biased_conv, dtype=self.dtype)
        for index, (channels, stride) in enumerate(self.layers):
            x = conv(channels, 3, stride, 1, name=f"conv{index}")(x)
            x = gelu(layer_norm(x, f"norm{index}").astype(self.dtype))
        return conv(self.features, 1, name="out")(x) if self.features else x


def conv_stem_rules(prefix: str, layers: int) -> Rules:
    """PyTorch's names: one sequence numbers convolutions, norms and activations."""
    return tuple(
        (f"{prefix}.{3 * index + place}", f"stem/{part}{index}")
        for index in range(layers)
        for place, part in enumerate(("conv", "norm"))
    )
