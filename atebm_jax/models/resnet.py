"""ResNets for ImageNet (He et al., 2016; wide ones: Zagoruyko and Komodakis, 2016).

ResNet-50 and Wide-ResNet-50-4 are two of the paper's ImageNet networks. The stride of a
bottleneck is in its 3x3 convolution, as in all public weights. The network normalises
its input, and its global average pooling fits any image size. ResNets for small images
are an option; their names are in `small_resnet`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import ml_collections

from atebm_jax.errors import UserError, check_choice
from atebm_jax.models import family
from atebm_jax.models.layers import (
    ACTIVATIONS,
    Conv,
    Dense,
    at_least_float32,
    batch_norm,
    max_pool,
    normed,
)

# Blocks of each of the four stages.
STAGES: dict[int, tuple[int, ...]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
}

# From this depth on, blocks are bottlenecks.
_BOTTLENECK_DEPTH = 50


class Block(nn.Module):
    """Two 3x3 convolutions, or a 3x3 between two 1x1, and a shortcut.

    Attributes:
      inner: channels inside.
      features: output channels.
      stride: of the first 3x3 convolution.
      bottleneck: whether the block is a 3x3 between two 1x1.
    """

    inner: int
    features: int
    stride: int
    bottleneck: bool
    activation: Callable[[jax.Array], jax.Array]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(Conv, dtype=self.dtype)
        # (channels, side of the window, stride) of each convolution.
        layers = [(self.inner, 3, self.stride), (self.features, 3, 1)]
        if self.bottleneck:
            layers = [(self.inner, 1, 1), (self.inner, 3, self.stride)]
            layers.append((self.features, 1, 1))
        y = x
        for index, (channels, side, stride) in enumerate(layers, start=1):
            y = self.activation(y.astype(self.dtype)) if index > 1 else y
            layer = conv(channels, side, stride, side // 2, name=f"conv{index}")
            y = normed(layer, batch_norm(f"bn{index}", train), y)
        if self.stride > 1 or x.shape[-1] != self.features:
            layer = conv(self.features, 1, self.stride, name="shortcut")
            x = normed(layer, batch_norm("shortcut_bn", train), x)
        return self.activation((y + x.astype(y.dtype)).astype(self.dtype))


class ResNet(family.Network):
    """Images [B, H, W, C] float in [0, 1] to logits [B, num_classes] float32.

    Attributes:
      depth: 18, 34, 50 or 101.
      base_width: channels inside the first stage's bottlenecks: 64, for wide networks
        128 or 256.
      activation: "relu", "swish" or "gelu".
      small: for small images: the first convolution is 3x3 with stride 1, and no
        pooling follows.
    """

    depth: int
    base_width: int = 64
    activation: str = "relu"
    small: bool = False

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, features: bool = False
    ) -> jax.Array:
        """Logits, or the pooled features [B, 512 or 2048] before them."""
        activation = ACTIVATIONS[self.activation]
        bottleneck = self.depth >= _BOTTLENECK_DEPTH
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        x = self.normalised(images)
        side, stride = (3, 1) if self.small else (7, 2)
        first = Conv(64, side, stride, side // 2, dtype=self.dtype, name="conv1")
        x = activation(normed(first, batch_norm("bn1", train), x).astype(self.dtype))
        x = x if self.small else max_pool(x, 3, 2, 1)
        for stage, num_blocks in enumerate(STAGES[self.depth]):
            planes = 64 * 2**stage
            for index in range(num_blocks):
                x = block(
                    inner=planes * self.base_width // 64,
                    features=4 * planes if bottleneck else planes,
                    stride=2 if stage > 0 and index == 0 else 1,
                    bottleneck=bottleneck,
                    activation=activation,
                    dtype=self.dtype,
                    name=f"layer{stage + 1}_{index}",
                )(x, train)
        x = at_least_float32(x).mean(axis=(1, 2))
        return x if features else Dense(self.num_classes, name="fc")(x)


def build(config: ml_collections.ConfigDict) -> ResNet:
    """Builds a ResNet from `config.model`.

    Raises:
      UserError: unknown depth or activation, or a width that does not fit the depth.
    """
    if config.depth not in STAGES:
        raise UserError(
            f"model.depth is {config.depth}: a ResNet has depth "
            f"{', '.join(map(str, STAGES))}."
        )
    narrow = config.depth < _BOTTLENECK_DEPTH
    if config.base_width < 1 or (narrow and config.base_width != 64):
        raise UserError(
            f"model.base_width is {config.base_width} and model.depth {config.depth}: "
            "the width is positive, and 64 below depth 50; wide ResNet-50s have 128 "
            "or 256."
        )
    check_choice("model.activation", config.activation, ACTIVATIONS)
    return ResNet(**family.network_fields(config, "depth", "base_width", "activation"))


def fields(shapes: family.Shapes) -> dict[str, Any]:
    """Depth and width that the blocks have; those for small images share the names."""
    template = "layer{}.{{}}.conv1.weight"
    blocks = tuple(family.count(shapes, template.format(s)) for s in range(1, 5))
    bottleneck = "layer1.0.conv3.weight" in shapes
    width = family.outputs(shapes, "layer1.0.conv1.weight") if bottleneck else 64
    found = {"base_width": width}
    for depth, stages in STAGES.items():
        if stages == blocks and (depth >= _BOTTLENECK_DEPTH) == bottleneck:
            found["depth"] = depth
    return found


def _is_grouped(shapes: family.Shapes) -> bool:
    """Whether the second convolution has fewer inputs than the first has outputs."""
    given = shapes.get("layer1.0.conv1.weight", ())[:1]
    seen = shapes.get("layer1.0.conv2.weight", ())[1:2]
    return () < seen < given


def _arch(depth: int, base_width: int = 64) -> dict[str, Any]:
    sizes = {"depth": depth, "base_width": base_width}
    return {**sizes, "num_classes": 1000, **family.IMAGENET}


FAMILY = family.Family(
    build=build,
    sized_by=("depth", "base_width"),
    fields={
        # 18, 34, 50 or 101.
        "depth": 34,
        # Channels inside the first bottlenecks: 64; wide ResNets have 128 or 256.
        "base_width": 64,
    },
    archs={
        "resnet18": _arch(18),
        "resnet34": _arch(34),
        "resnet50": _arch(50),
        "resnet101": _arch(101),
        "wide_resnet50_2": _arch(50, 128),
        "wide_resnet50_4": _arch(50, 256),
    },
    compiled_share=0.63,
    # The names of timm and torchvision.
    torch=family.TorchNames(
        rules=(
            ("conv1", "conv1"),
            ("bn1", "bn1"),
            ("layer{s}.{b}.conv{k}", "layer{s}_{b}/conv{k}"),
            ("layer{s}.{b}.bn{k}", "layer{s}_{b}/bn{k}"),
            ("layer{s}.{b}.downsample.0", "layer{s}_{b}/shortcut"),
            ("layer{s}.{b}.downsample.1", "layer{s}_{b}/shortcut_bn"),
            ("fc", "fc"),
        ),
        mark="layer1.0.conv1.weight",
        first=("conv1.weight",),
        fields=fields,
        side=lambda model: 256,
        # Chen2024's robust Wide-ResNet-50-2 sees pixels as they are.
        usual=lambda model: None if model["base_width"] == 128 else family.IMAGENET,
        who="--normalization=imagenet (torchvision, timm, Salman2020) or "
        "--normalization=none (Chen2024)",
        published="torchvision, timm; Engstrom2019, Salman2020 and Wong2020 of "
        "RobustBench for ImageNet; DAT for ImageNet",
        look_alikes={
            "a ResNet with squeeze and excitation": r"layer\d\.\d+\.se\..*",
            "a ResNet-D (three convolutions first)": r"conv1\.\d\.weight",
            "a ResNet V2 (BiT)": (
                r"root\.conv\.weight|block1\.unit01\..*|"
                r"stages\.\d+\.blocks\.\d+\.conv3\.weight"
            ),
            "a ResNeXt (grouped convolutions)": _is_grouped,
        },
    ),
)
