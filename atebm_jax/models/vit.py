"""Vision transformer (Dosovitskiy et al., 2021), with 16x16 patches or a ConvStem.

Sizes are DeiT's (Touvron et al., 2021). The position embedding is stored for one grid
of patches and interpolated to the images' grid. There is no dropout and no stochastic
depth: nothing depends on `train`. The sum of the residual branches is float32 also
where the branches compute in bfloat16.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from atebm_jax.errors import UserError, check_choice
from atebm_jax.models import family
from atebm_jax.models.layers import (
    INIT,
    Dense,
    LayerNorm,
    at_least_float32,
    check_sides,
    layer_norm,
    mlp,
    prepared,
    self_attention,
)
from atebm_jax.models.stem import STEMS, ConvStem, PatchStem, conv_stem_rules

# Channels and attention heads.
SIZES: dict[str, tuple[int, int]] = {"small": (384, 6), "base": (768, 12)}

PATCH = 16
DEPTH = 12

# (channels, stride) of each 3x3 convolution of the ConvStem, for both sizes.
CONV_STEM = ((48, 2), (96, 2), (192, 2), (384, 2))


class Block(nn.Module):
    """Norm and self-attention, then norm and two dense layers, each added."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first, second = LayerNorm(name="norm1"), LayerNorm(name="norm2")
        x = x + self_attention(x, self.heads, self.dtype, norm=first)
        return x + mlp(x, self.dtype, second)


class ViT(family.Network):
    """Images [B, H, W, C] float in [0, 1] to logits [B, num_classes] float32.

    Attributes:
      size: a key of `SIZES`.
      stem: "patch" (16x16) or "conv" (`CONV_STEM`, then 1x1).
      position_grid: side of the grid that the position embedding is stored for.
    """

    size: str
    stem: str = "patch"
    position_grid: int = 14

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, features: bool = False
    ) -> jax.Array:
        """Logits, or the normalised class token [B, channels] before them.

        Raises:
          UserError: a side that is no multiple of 16.
        """
        del train
        check_sides(images, PATCH, "a ViT")
        block = nn.remat(Block) if self.remat else Block
        channels, heads = SIZES[self.size]
        x = self.normalised(images)
        x = at_least_float32(self._stem(channels)(x))
        position = self._position(channels, (x.shape[1], x.shape[2]))
        shape = (1, 1, channels)
        token = self.param("cls_token", nn.initializers.normal(1e-6), shape)
        tokens = jnp.broadcast_to(token, (x.shape[0], 1, channels)).astype(x.dtype)
        x = jnp.concatenate([tokens, x.reshape(x.shape[0], -1, channels)], axis=1)
        x = x + position
        for index in range(DEPTH):
            x = block(heads, self.dtype, name=f"block{index}")(x)
        x = layer_norm(x[:, 0], "norm")
        fc = Dense(self.num_classes, kernel_init=INIT, name="fc")
        return x if features else fc(x)

    def _stem(self, channels: int) -> nn.Module:
        if self.stem == "conv":
            return ConvStem(CONV_STEM, self.dtype, channels, name="stem")
        return PatchStem(channels, PATCH, False, self.dtype, name="stem")

    def _position(self, channels: int, grid: tuple[int, int]) -> jax.Array:
        """Position embedding of the class token and a grid: [1, 1 + h w, channels]."""
        side = self.position_grid
        shape = (1, 1 + side**2, channels)
        kept = self.param("pos_embed", INIT, shape)
        if grid == (side, side):
            return kept

        def resized() -> jax.Array:
            patches = kept[:, 1:].reshape(1, side, side, channels)
            made = jax.image.resize(patches, (1, *grid, channels), "bicubic")
            return jnp.concatenate([kept[:, :1], made.reshape(1, -1, channels)], axis=1)

        return prepared(self, resized)


def build(config: ml_collections.ConfigDict) -> ViT:
    """Builds a ViT from `config.model`.

    Raises:
      UserError: unknown size or stem, an empty grid.
    """
    check_choice("model.size", config.size, SIZES, of=" of a ViT")
    check_choice("model.stem", config.stem, STEMS)
    if config.position_grid < 1:
        raise UserError(
            f"model.position_grid is {config.position_grid}: it must be positive."
        )
    return ViT(**family.network_fields(config, "size", "stem", "position_grid"))


def _aliases() -> Iterator[tuple[str, str]]:
    # torchvision.
    yield "class_token", "cls_token"
    yield "encoder.pos_embedding", "pos_embed"
    yield "conv_proj.{leaf}", "patch_embed.proj.{leaf}"
    theirs, ours = "encoder.layers.encoder_layer_{b}", "blocks.{b}"
    yield f"{theirs}.ln_{{k}}.{{leaf}}", f"{ours}.norm{{k}}.{{leaf}}"
    attention = f"{theirs}.self_attention"
    yield f"{attention}.in_proj_{{leaf}}", f"{ours}.attn.qkv.{{leaf}}"
    yield f"{attention}.out_proj.{{leaf}}", f"{ours}.attn.proj.{{leaf}}"
    yield f"{theirs}.mlp.0.{{leaf}}", f"{ours}.mlp.fc1.{{leaf}}"
    yield f"{theirs}.mlp.3.{{leaf}}", f"{ours}.mlp.fc2.{{leaf}}"
    yield f"{theirs}.mlp.linear_{{k}}.{{leaf}}", f"{ours}.mlp.fc{{k}}.{{leaf}}"
    yield "encoder.ln.{leaf}", "norm.{leaf}"
    yield "heads.head.{leaf}", "head.{leaf}"


def _fields(shapes: family.Shapes) -> dict[str, Any]:
    stem = "conv" if "patch_embed.proj.stem.0.weight" in shapes else "patch"
    found: dict[str, Any] = {"stem": stem}
    position = shapes.get("pos_embed", ())
    if len(position) == 3 and position[1] > 1:
        found["position_grid"] = math.isqrt(position[1] - 1)
    for size, (width, _) in SIZES.items():
        if shapes["blocks.0.attn.qkv.weight"][-1:] == (width,):
            found["size"] = size
    return found


def _usual(model: family.ModelFields) -> Mapping[str, tuple[float, ...]] | None:
    """All weights with a ConvStem come from one release (Singh et al., 2023).

    Of its ViTs only the small one normalises its input.
    """
    if model["stem"] != "conv":
        return None
    return family.IMAGENET if model["size"] == "small" else family.AS_THEY_ARE


def _arch(size: str, stem: str, normalisation: family.ModelFields) -> dict[str, Any]:
    sizes = {"size": size, "stem": stem, "position_grid": 14}
    return {**sizes, "num_classes": 1000, **normalisation}


FAMILY = family.Family(
    build=build,
    sized_by=("size", "stem"),
    fields={
        # "small" or "base".
        "size": "base",
        # First layers: "patch", or "conv" for convolutions (ConvStem).
        "stem": "patch",
        # Side of the grid of patches that the position embedding is kept for; images
        # with another grid get it interpolated.
        "position_grid": 14,
    },
    archs={
        "vit_s": _arch("small", "patch", family.IMAGENET),
        "vit_b": _arch("base", "patch", family.IMAGENET),
        "vit_s_cvst": _arch("small", "conv", family.IMAGENET),
        "vit_b_cvst": _arch("base", "conv", family.AS_THEY_ARE),
    },
    activation="gelu",
    # The names of timm.
    torch=family.TorchNames(
        rules=(
            ("", ""),
            ("patch_embed.proj", "stem/proj"),
            *conv_stem_rules("patch_embed.proj.stem", 4),
            ("patch_embed.proj.stem.12", "stem/out"),
            ("blocks.{b}.norm{k}", "block{b}/norm{k}"),
            ("blocks.{b}.attn.qkv", "block{b}/qkv"),
            ("blocks.{b}.attn.proj", "block{b}/proj"),
            ("blocks.{b}.mlp.fc{k}", "block{b}/fc{k}"),
            ("norm", "norm"),
            ("head", "fc"),
        ),
        mark="blocks.0.attn.qkv.weight",
        first=("patch_embed.proj.weight", "patch_embed.proj.stem.0.weight"),
        fields=_fields,
        side=lambda model: PATCH * model["position_grid"],
        usual=_usual,
        who="--normalization=imagenet (DeiT, torchvision), --mean=0.5 --std=0.5 "
        "(Google's and timm's augreg weights) or --normalization=none (pixels as they "
        "are)",
        published="DeiT, Google's augreg weights, timm, torchvision; Singh2023 "
        "(ConvStem) of RobustBench",
        aliases=tuple(_aliases()),
        bare={"cls_token": 3, "pos_embed": 3},
        look_alikes={
            "a CaiT (class attention)": r"blocks_token_only\..*",
            "a distilled DeiT (a second token and head)": r"dist_token|head_dist\..*",
            "a ViT with register tokens": r"(reg_token|register_tokens)",
            "a masked autoencoder's ViT": r"mask_token|decoder_blocks\..*",
            "a ViT with layer scale (BEiT, DeiT III)": (
                r"blocks\.\d+\.(ls1\.gamma|gamma_1)"
            ),
            "a transformer with relative positions": (
                lambda shapes: "blocks.0.attn.relative_position_bias_table" in shapes
            ),
            "an EVA transformer": (
                # A Swin V2 has such blocks in stages, "layers.0.blocks.0".
                r"(?<!\d\.)blocks\.\d+\.(attn\.q_bias|mlp\.(w1|w12|fc1_g)\.weight)"
            ),
            "a hybrid of a ResNet and a ViT": r"patch_embed\.backbone\..*",
        },
    ),
)
