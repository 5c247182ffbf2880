"""XCiT (Ali et al., 2021), with 16x16, 8x8 or 4x4 patches from convolutions.

Channels attend to channels and not patches to patches, a pair of 3x3 convolutions
mixes neighbouring patches, and two blocks of class attention read the patches at the
end. The robust XCiTs of Debenedetti et al. (2023) have 12 blocks; those for small
images are the same networks with stride 1 in the first two convolutions.

The position code is made of sines, so that any image size fits. Batch normalisation is
in the first convolutions and between the 3x3 convolutions of a block. There is no
dropout and no stochastic depth. The sum of the residual branches is float32 also where
the branches compute in bfloat16.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from atebm_jax.errors import UserError, check_choice
from atebm_jax.models import family
from atebm_jax.models.layers import (
    INIT,
    Conv,
    Dense,
    LayerNorm,
    at_least_float32,
    batch_norm,
    check_sides,
    gelu,
    layer_norm,
    mlp,
    normed,
    prepared,
    self_attention,
    unit,
)
from atebm_jax.models.stem import biased_conv

# Channels and attention heads.
SIZES: dict[str, tuple[int, int]] = {
    "tiny": (192, 4),
    "small": (384, 8),
    "medium": (512, 8),
    "large": (768, 16),
}

# Strides of the first convolutions, by the side of the patches that they make.
STRIDES: dict[int, tuple[int, ...]] = {
    16: (2, 2, 2, 2),
    8: (2, 2, 2),
    4: (1, 1, 2, 2),
}

CLASS_BLOCKS = 2

# More would only take long to trace: public networks have 12 or 24 blocks.
_DEEPEST = 96

# Frequencies of the position code: so many for rows, and so many for columns.
_FREQUENCIES = 32


class Stem(nn.Module):
    """3x3 convolutions, each with batch normalisation, and GELU between them.

    Attributes:
      features: output channels of the last one; each has twice those of the one before.
      strides: of each.
    """

    features: int
    strides: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for index, stride in enumerate(self.strides):
            channels = self.features >> (len(self.strides) - 1 - index)
            conv = Conv(channels, 3, stride, 1, dtype=self.dtype, name=f"conv{index}")
            x = gelu(x) if index else x
            x = normed(conv, batch_norm(f"bn{index}", train), x)
        return x


class CrossCovariance(nn.Module):
    """Attention of channels to channels: [B, tokens, channels] -> the same shape."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.heads, 1, 1)
        temperature = self.param("temperature", nn.initializers.ones, shape)

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            # Each channel is a token, and its values over the image are its channels.
            scale = temperature.reshape(1, 1, self.heads, 1)
            query, key, value = (y.swapaxes(1, 3) for y in (query, key, value))
            query = (unit(query) * scale).astype(value.dtype)
            key = unit(key).astype(value.dtype)
            y = jax.nn.dot_product_attention(query, key, value, scale=1.0)
            return y.swapaxes(1, 3)

        return self_attention(x, self.heads, self.dtype, attend)


class Block(nn.Module):
    """Attention of channels, two 3x3 convolutions, two dense layers, each added."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1]
        conv = partial(
            biased_conv, channels, 3, padding=1, groups=channels, dtype=self.dtype
        )
        scales = [
            self.param(f"gamma{k}", nn.initializers.ones, (channels,))[None, None, None]
            for k in (1, 2, 3)
        ]
        y = layer_norm(x, "norm1").reshape(x.shape[0], -1, channels)
        y = CrossCovariance(self.heads, self.dtype, name="attn")(y)
        x = x + scales[0] * y.reshape(x.shape)
        # The authors number these layers 3, though they come before those of number 2.
        y = gelu(conv(name="local1")(layer_norm(x, "norm3")))
        y = conv(name="local2")(batch_norm("local_bn", train)(at_least_float32(y)))
        x = x + scales[2] * at_least_float32(y)
        return x + scales[1] * mlp(x, self.dtype, LayerNorm(name="norm2"))


class ClassBlock(nn.Module):
    """The first token reads all tokens: [B, 1 + patches, channels] -> the same shape.

    What the authors' code does to the patches is kept: they are replaced by their sums
    with what is normalised.
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scales = [
            self.param(f"gamma{k}", nn.initializers.ones, (channels,))[None, None]
            for k in (1, 2)
        ]
        # Chosen, not concatenated: of the latter before a norm a GPU's compiler makes
        # a program that it then refuses (jax 0.10.2).
        is_first = jnp.arange(x.shape[1])[:, None] == 0
        y = layer_norm(x, "norm1")
        x = x + scales[0] * jnp.where(is_first, self._read(y), y)
        x = layer_norm(x, "norm2")
        return x + jnp.where(is_first, scales[1] * mlp(x[:, :1], self.dtype), x)

    def _read(self, x: jax.Array) -> jax.Array:
        """What the first token takes from all of them: [B, 1, channels]."""
        channels = x.shape[-1]
        dense = partial(Dense, channels, dtype=self.dtype, kernel_init=INIT)
        parts = {"q": x[:, :1], "k": x, "v": x}
        query, key, value = (
            dense(name=name)(y).reshape(*y.shape[:2], self.heads, -1)
            for name, y in parts.items()
        )
        y = jax.nn.dot_product_attention(query, key, value)
        return at_least_float32(dense(name="proj")(y.reshape(x.shape[0], 1, channels)))


def position_code(height: int, width: int) -> np.ndarray:
    """Sines and cosines of the rows and the columns of a grid: [1, height, width, 64].

    A side of the grid is one turn of the slowest of the 16 frequencies, which fall
    geometrically to nearly 1 / 10,000 of it (Vaswani et al., 2017).
    """
    index = np.arange(_FREQUENCIES)
    slowness = 10_000.0 ** (2 * (index // 2) / _FREQUENCIES)

    def code(side: int) -> np.ndarray:
        turns = np.arange(1, side + 1) / (side + 1e-6)
        angles = 2 * np.pi * turns[:, None] / slowness
        return np.where(index % 2 == 0, np.sin(angles), np.cos(angles))

    shape = (height, width, _FREQUENCIES)
    rows = np.broadcast_to(code(height)[:, None], shape)
    columns = np.broadcast_to(code(width)[None], shape)
    return np.concatenate([rows, columns], axis=-1)[None]


class XCiT(family.Network):
    """Images [B, H, W, C] float in [0, 1] to logits [B, num_classes] float32.

    Attributes:
      size: a key of `SIZES`.
      depth: blocks before the class attention.
      patch: side of the patches in pixels, a key of `STRIDES`.
    """

    size: str
    depth: int = 12
    patch: int = 16

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, features: bool = False
    ) -> jax.Array:
        """Logits, or the normalised class token [B, channels] before them.

        Raises:
          UserError: a side that is no multiple of the patches'.
        """
        check_sides(images, self.patch, f"an XCiT with patches of {self.patch}")
        block: Any = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        class_block = nn.remat(ClassBlock) if self.remat else ClassBlock
        channels, heads = SIZES[self.size]
        x = self.normalised(images)
        x = Stem(channels, STRIDES[self.patch], self.dtype, name="stem")(x, train)
        conv = biased_conv(channels, 1, dtype=self.dtype, name="position")
        code = jnp.asarray(position_code(*x.shape[1:3]), x.dtype)
        x = x + prepared(self, lambda: at_least_float32(conv(code)))
        for index in range(self.depth):
            x = block(heads, self.dtype, name=f"block{index}")(x, train)
        shape = (1, 1, channels)
        token = self.param("cls_token", INIT, shape).astype(x.dtype)
        tokens = jnp.broadcast_to(token, (x.shape[0], 1, channels))
        x = jnp.concatenate([tokens, x.reshape(x.shape[0], -1, channels)], axis=1)
        for index in range(CLASS_BLOCKS):
            x = class_block(heads, self.dtype, name=f"class{index}")(x)
        x = layer_norm(x[:, 0], "norm")
        fc = Dense(self.num_classes, kernel_init=INIT, name="fc")
        return x if features else fc(x)


def build(config: ml_collections.ConfigDict) -> XCiT:
    """Builds an XCiT from `config.model`.

    Raises:
      UserError: unknown size or patch, or a depth out of range.
    """
    check_choice("model.size", config.size, SIZES, of=" of an XCiT")
    if config.patch not in STRIDES:
        raise UserError(
            f"model.patch is {config.patch}: an XCiT has patches of "
            f"{', '.join(map(str, STRIDES))} pixels a side."
        )
    if not 1 <= config.depth <= _DEEPEST:
        raise UserError(
            f"model.depth is {config.depth}: an XCiT has 1 to {_DEEPEST} blocks, "
            "public ones 12 or 24."
        )
    return XCiT(**family.network_fields(config, "size", "depth", "patch"))


# Input normalisation of the robust XCiTs for small images, by number of classes.
_CIFAR = {
    10: {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)},
    100: {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)},
}


def _fields(shapes: family.Shapes) -> dict[str, Any]:
    """Strides are in no array: small images have few classes in public weights."""
    found: dict[str, Any] = {
        "depth": family.count(shapes, "blocks.{}.local_mp.conv1.weight"),
        "patch": 8 if "patch_embed.proj.6.0.weight" not in shapes else 16,
    }
    if found["patch"] == 16 and shapes.get("head.weight", (0,))[0] in _CIFAR:
        found["patch"] = 4
    width = family.outputs(shapes, "blocks.0.local_mp.conv1.weight")
    for size, (channels, _) in SIZES.items():
        if channels == width:
            found["size"] = size
    return found


def _usual(model: family.ModelFields) -> Mapping[str, tuple[float, ...]] | None:
    """The robust ones for ImageNet have none, those of the XCiT paper ImageNet's.

    Which of the two a small one with 12 blocks is, its shapes do not say. The paper
    has no medium and no large ones with 12 blocks, and only it has other sizes.
    """
    if model["patch"] == 4:
        return _CIFAR.get(model["num_classes"])
    if model["patch"] == 16 and model["depth"] == 12 and model["size"] != "tiny":
        return None if model["size"] == "small" else family.AS_THEY_ARE
    return family.IMAGENET


def _settle(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Class attention of the authors' files: one layer makes query, key and value."""
    settled: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        before, layer, leaf = name.partition(".attn.qkv.")
        if layer and before.startswith("cls_attn_blocks.") and len(array) % 3 == 0:
            for part, values in zip("qkv", np.split(array, 3), strict=True):
                settled[f"{before}.attn.{part}.{leaf}"] = values
        else:
            settled[name] = array
    return settled


def _arch(size: str, patch: int, normalisation: family.ModelFields) -> dict[str, Any]:
    sizes = {"size": size, "depth": 12, "patch": patch}
    return {**sizes, "num_classes": 10 if patch == 4 else 1000, **normalisation}


_NAMED = {"xcit_s12": "small", "xcit_m12": "medium", "xcit_l12": "large"}

FAMILY = family.Family(
    build=build,
    sized_by=("size", "depth", "patch"),
    fields={
        # "tiny", "small", "medium" or "large".
        "size": "base",
        # Blocks before the class attention.
        "depth": 34,
        # Side of the patches in pixels: 16, 8, or 4 for small images.
        "patch": 16,
    },
    archs={name: _arch(size, 16, family.AS_THEY_ARE) for name, size in _NAMED.items()}
    | {f"{name}_p4": _arch(size, 4, _CIFAR[10]) for name, size in _NAMED.items()},
    activation="gelu",
    compiled_share=0.54,
    # The names of timm.
    torch=family.TorchNames(
        rules=(
            ("", ""),
            *(
                (f"patch_embed.proj.{2 * index}.{place}", f"stem/{part}{index}")
                for index in range(4)
                for place, part in enumerate(("conv", "bn"))
            ),
            ("pos_embed.token_projection", "position"),
            ("blocks.{b}", "block{b}"),
            ("blocks.{b}.norm{k}", "block{b}/norm{k}"),
            ("blocks.{b}.attn", "block{b}/attn"),
            ("blocks.{b}.attn.qkv", "block{b}/attn/qkv"),
            ("blocks.{b}.attn.proj", "block{b}/attn/proj"),
            ("blocks.{b}.local_mp.conv{k}", "block{b}/local{k}"),
            ("blocks.{b}.local_mp.bn", "block{b}/local_bn"),
            ("blocks.{b}.mlp.fc{k}", "block{b}/fc{k}"),
            ("cls_attn_blocks.{b}", "class{b}"),
            ("cls_attn_blocks.{b}.norm{k}", "class{b}/norm{k}"),
            *(
                (f"cls_attn_blocks.{{b}}.attn.{part}", f"class{{b}}/{part}")
                for part in ("q", "k", "v", "proj")
            ),
            ("cls_attn_blocks.{b}.mlp.fc{k}", "class{b}/fc{k}"),
            ("norm", "norm"),
            ("head", "fc"),
        ),
        published="the authors, timm; Debenedetti2022 of RobustBench",
        mark="blocks.0.local_mp.conv1.weight",
        first=("patch_embed.proj.0.0.weight",),
        fields=_fields,
        unsaid=lambda fields: (
            {} if fields["patch"] == 8 else {"patch": "--arch gives another"}
        ),
        side=lambda model: 32 if model["patch"] == 4 else 224,
        usual=_usual,
        who="--normalization=none (Debenedetti2022) or --normalization=imagenet (timm, "
        "the authors)",
        # The authors.
        aliases=(
            (
                "pos_embeder.token_projection.{leaf}",
                "pos_embed.token_projection.{leaf}",
            ),
        ),
        settle=_settle,
        bare={
            "cls_token": 3,
            "temperature": 3,
            "gamma1": 1,
            "gamma2": 1,
            "gamma3": 1,
        },
    ),
)
