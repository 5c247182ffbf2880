"""Vision transformer (Dosovitskiy et al., 2021), with 16x16 patches or a ConvStem.

Sizes as in DeiT (Touvron et al., 2021). The position embedding is kept for one grid of
patches and interpolated to that of the images. No dropout and no stochastic depth:
nothing depends on `train`. The sum of the residual branches is float32 also where the
branches compute in bfloat16.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from atebm_jax.errors import UserError
from atebm_jax.models.layers import Normalize, at_least_float32, gelu, layer_norm
from atebm_jax.models.stem import STEMS, ConvStem, PatchStem

# Channels and attention heads.
SIZES: dict[str, tuple[int, int]] = {"small": (384, 6), "base": (768, 12)}

PATCH = 16
DEPTH = 12

# (channels, stride) of each 3x3 convolution of the ConvStem, for both sizes.
CONV_STEM = ((48, 2), (96, 2), (192, 2), (384, 2))

_INIT = nn.initializers.truncated_normal(0.02)


class Block(nn.Module):
    """Self-attention and two dense layers, each after a norm and added."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        dense = {"dtype": self.dtype, "kernel_init": _INIT}
        y = nn.Dense(3 * channels, name="qkv", **dense)(layer_norm(x, "norm1"))
        # The three come one after the other, each as [heads, channels a head].
        split = y.reshape(*y.shape[:2], 3, self.heads, channels // self.heads)
        y = jax.nn.dot_product_attention(*jnp.unstack(split, axis=2))
        y = nn.Dense(channels, name="proj", **dense)(y.reshape(x.shape))
        x = x + at_least_float32(y)
        y = nn.Dense(4 * channels, name="fc1", **dense)(layer_norm(x, "norm2"))
        y = gelu(y)
        return x + at_least_float32(nn.Dense(channels, name="fc2", **dense)(y))


class ViT(nn.Module):
    """Images [B, H, W, C] float in [0, 1] to logits [B, num_classes] float32.

    Attributes:
      size: a key of `SIZES`.
      num_classes: K.
      stem: "patch" (16x16) or "conv" (`CONV_STEM`, then 1x1).
      position_grid: side of the grid that the position embedding is kept for.
      mean, std: input normalisation, one number a channel; empty for none.
      dtype: compute dtype of convolutions, dense layers and attention.
      conv_gradient: see `layers.chosen_form`.
      remat: compute a block's activations again in the backward pass.
    """

    size: str
    num_classes: int
    stem: str = "patch"
    position_grid: int = 14
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    dtype: Any = jnp.float32
    conv_gradient: str = "auto"
    remat: bool = False

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, features: bool = False
    ) -> jax.Array:
        """Logits, or the normalised class token [B, channels] before them.

        Args:
          images: [B, H, W, C] float in [0, 1], sides multiples of 16.
          train: without effect.
          features: return what the linear layer would see.

        Raises:
          UserError: a side that is no multiple of 16.
        """
        del train
        if images.shape[1] % PATCH or images.shape[2] % PATCH:
            raise UserError(
                f"image_shape begins with {images.shape[1:3]}: both sides must be "
                f"multiples of {PATCH} pixels for a ViT."
            )
        block = nn.remat(Block) if self.remat else Block
        channels, heads = SIZES[self.size]
        x = Normalize(self.mean, self.std)(images) if self.mean else images
        x = at_least_float32(self._stem(channels)(x))
        position = self._position(channels, (x.shape[1], x.shape[2]))
        shape = (1, 1, channels)
        token = self.param("cls_token", nn.initializers.normal(1e-6), shape)
        tokens = jnp.broadcast_to(token, (len(x), 1, channels)).astype(x.dtype)
        x = jnp.concatenate([tokens, x.reshape(len(x), -1, channels)], axis=1)
        x = x + position
        for index in range(DEPTH):
            x = block(heads, self.dtype, name=f"block{index}")(x)
        x = layer_norm(x[:, 0], "norm")
        fc = nn.Dense(self.num_classes, kernel_init=_INIT, name="fc")
        return x if features else fc(x)

    def _stem(self, channels: int) -> nn.Module:
        conv = {"dtype": self.dtype, "conv_gradient": self.conv_gradient}
        if self.stem == "conv":
            return ConvStem(CONV_STEM, channels, name="stem", **conv)
        return PatchStem(channels, PATCH, norm=False, name="stem", **conv)

    def _position(self, channels: int, grid: tuple[int, int]) -> jax.Array:
        """Position embedding of the class token and a grid: [1, 1 + h w, channels]."""
        side = self.position_grid
        shape = (1, 1 + side**2, channels)
        kept = self.param("pos_embed", _INIT, shape)
        if grid == (side, side):
            return kept
        patches = kept[:, 1:].reshape(1, side, side, channels)
        resized = jax.image.resize(patches, (1, *grid, channels), "bicubic")
        return jnp.concatenate([kept[:, :1], resized.reshape(1, -1, channels)], axis=1)


def build(config: ml_collections.ConfigDict) -> ViT:
    """Builds a ViT from `config.model`.

    Raises:
      UserError: unknown size or stem, an empty grid, no classes.
    """
    if config.size not in SIZES:
        raise UserError(
            f"unknown model.size {config.size!r} of a ViT: choose one of "
            f"{', '.join(SIZES)}."
        )
    if config.stem not in STEMS:
        raise UserError(
            f"unknown model.stem {config.stem!r}: choose one of {', '.join(STEMS)}."
        )
    if config.position_grid < 1 or config.num_classes < 1:
        raise UserError(
            f"model.position_grid is {config.position_grid} and model.num_classes "
            f"{config.num_classes}: both must be positive."
        )
    return ViT(
        size=config.size,
        num_classes=config.num_classes,
        stem=config.stem,
        position_grid=config.position_grid,
        mean=tuple(config.mean),
        std=tuple(config.std),
        dtype=jnp.dtype(config.dtype),
        conv_gradient=config.conv_gradient,
        remat=config.remat,
    )
