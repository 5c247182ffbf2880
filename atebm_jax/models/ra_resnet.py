"""RaWRN for ImageNet (Peng et al., 2023, Robust principles).

Bottlenecks with grouped convolutions and squeeze and excitation, in four stages that
halve the resolution, the first one too; SiLU, and no norm after a block's first
convolution. The stem is a 7x7 convolution without pooling.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import ml_collections

from atebm_jax.errors import UserError, check_choice
from atebm_jax.models import family, ra_wide_resnet
from atebm_jax.models.layers import (
    ACTIVATIONS,
    Conv,
    Dense,
    SqueezeExcitation,
    at_least_float32,
    batch_norm,
    normed,
    relu,
)

# Of the 3x3 convolutions.
_GROUPS = 2


class Block(nn.Module):
    """A grouped 3x3 convolution between two 1x1, gates, and a shortcut.

    A quarter of the outputs are inside; gates have a quarter of the inputs inside.

    Attributes:
      features: output channels.
      stride: of the 3x3 convolution and of the shortcut.
    """

    features: int
    stride: int
    activation: Callable[[jax.Array], jax.Array]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(Conv, dtype=self.dtype)
        inner = self.features // 4
        y = self.activation(conv(inner, 1, name="conv1")(x))
        second = conv(inner, 3, self.stride, 1, _GROUPS, name="conv2")
        y = normed(second, batch_norm("bn2", train), y).astype(self.dtype)
        y = self.activation(y)
        gates = max(round(x.shape[-1] / 4), 1)
        y = SqueezeExcitation(gates, self.dtype, name="se")(y)
        third = conv(self.features, 1, name="conv3")
        y = normed(third, batch_norm("bn3", train), y)
        if self.stride > 1 or x.shape[-1] != self.features:
            shortcut = conv(self.features, 1, self.stride, name="shortcut")
            x = normed(shortcut, batch_norm("shortcut_bn", train), x)
        return self.activation((y + x.astype(y.dtype)).astype(self.dtype))


class RaResNet(family.Network):
    """Images [B, H, W, C] float in [0, 1] to logits [B, num_classes] float32.

    Attributes:
      blocks: number of blocks of each stage.
      widths: channels of the stem, then of each stage.
      activation: "relu", "swish" or "gelu"; the stem has ReLU.
    """

    blocks: Sequence[int]
    widths: Sequence[int]
    activation: str = "swish"

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, features: bool = False
    ) -> jax.Array:
        """Logits, or the pooled features [B, last width] before them."""
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        stem, *widths = self.widths
        x = self.normalised(images)
        first = Conv(stem, 7, 2, 3, dtype=self.dtype, name="conv1")
        x = relu(normed(first, batch_norm("bn1", train), x).astype(self.dtype))
        for stage, number in enumerate(self.blocks):
            for index in range(number):
                x = block(
                    features=widths[stage],
                    stride=1 if index else 2,
                    activation=ACTIVATIONS[self.activation],
                    dtype=self.dtype,
                    name=f"layer{stage + 1}_{index}",
                )(x, train)
        x = at_least_float32(x).mean(axis=(1, 2))
        return x if features else Dense(self.num_classes, name="fc")(x)


def build(config: ml_collections.ConfigDict) -> RaResNet:
    """Builds a RaResNet from `config.model`.

    Raises:
      UserError: no depths or widths, widths that make no groups, unknown activation.
    """
    blocks, widths = ra_wide_resnet.sizes(config.blocks, config.widths, 4)
    if any(width % (4 * _GROUPS) for width in widths[1:]):
        raise UserError(
            f"model.widths is {config.widths}: those of the stages must be multiples "
            f"of {4 * _GROUPS}."
        )
    check_choice("model.activation", config.activation, ACTIVATIONS)
    return RaResNet(blocks, widths, **family.network_fields(config, "activation"))


_LAYERS = {"F.a.0": "conv1", "F.b.0": "conv2", "F.b.1": "bn2", "F.c.0": "conv3"}
_LAYERS |= {"F.c.1": "bn3", "proj.0": "shortcut", "proj.1": "shortcut_bn"}
_LAYERS |= {"F.se.fc{k}": "se/fc{k}"}


def _stage(stage: int | str) -> str:
    return f"stages.stage{stage}.stage{stage}-block"


FAMILY = family.Family(
    build=build,
    sized_by=("blocks", "widths"),
    # Of four stages.
    fields=ra_wide_resnet.FAMILY.fields,
    archs={
        "ra_wrn101_2": {
            "blocks": "7-11-18-1",
            "widths": "96-512-1024-2016-4032",
            "activation": "swish",
            "num_classes": 1000,
            **family.IMAGENET,
        },
    },
    torch=family.TorchNames(
        rules=(
            ("stem.stem.stem.0", "conv1"),
            ("stem.stem.stem.1", "bn1"),
            *family.block_rules(_stage("{g}") + "{b}", "layer{g}_{b}", _LAYERS, 4),
            ("fc", "fc"),
        ),
        published="Peng2023 for ImageNet (RaWRN-101-2)",
        mark=f"{_stage(1)}0.F.se.fc1.weight",
        first=("stem.stem.stem.0.weight",),
        fields=lambda shapes: ra_wide_resnet.fields(
            shapes,
            "stem.stem.stem.0.weight",
            [f"{_stage(stage)}{{}}.F.c.0.weight" for stage in range(1, 5)],
        ),
        side=lambda model: 256,
        usual=lambda model: family.IMAGENET,
        activation="swish",
    ),
)
