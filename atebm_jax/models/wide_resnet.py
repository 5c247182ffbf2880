"""Pre-activation WideResNet for small images (Zagoruyko and Komodakis, 2016).

WRN-34-10 is the paper's CIFAR network. Depth is 6n + 4, the width any. The network
normalises its input, and its global average pooling fits any image size.
"""

from collections.abc import Callable, Sequence
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
    MeanSparse,
    SqueezeExcitation,
    batch_norm,
    check_sides,
    normed,
    padding_3x3,
)

# Tracing a deeper network would seem to hang; nobody trains one.
_DEEPEST = 1000


class Block(nn.Module):
    """Two 3x3 convolutions after norm and activation, with a shortcut.

    Where width or resolution changes, the shortcut is a 1x1 convolution of the
    activated input.

    Attributes:
      features: output channels.
      stride: of the first convolution and of the shortcut.
      same_padding: as of `layers.padding_3x3`.
      squeeze: channels of squeeze and excitation after the convolutions; 0 for none.
      sparse: whether `MeanSparse` follows each norm and the block.
    """

    features: int
    stride: int
    activation: Callable[[jax.Array], jax.Array]
    dtype: Any
    same_padding: bool = False
    squeeze: int = 0
    sparse: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(Conv, self.features, dtype=self.dtype)
        active = self.sparsified(1, batch_norm("bn1", train)(x)).astype(self.dtype)
        active = self.activation(active)
        around = padding_3x3(self.stride, self.same_padding)
        first = conv(3, self.stride, around, name="conv1")
        y = self.sparsified(2, normed(first, batch_norm("bn2", train), active))
        y = self.activation(y.astype(self.dtype))
        y = conv(3, 1, 1, name="conv2")(y)
        if self.squeeze:
            y = SqueezeExcitation(self.squeeze, self.dtype, name="se")(y)
        if self.stride == 1 and x.shape[-1] == self.features:
            return self.sparsified(3, x + y)
        return self.sparsified(3, y + conv(1, self.stride, name="shortcut")(active))

    def sparsified(self, place: int, x: jax.Array) -> jax.Array:
        """The activations of a place, sparse where the network is."""
        return MeanSparse(name=f"sparse{place}")(x) if self.sparse else x


class PreActivated(family.Network, kw_only=True):
    """Groups of blocks, each group after the first at half the resolution.

    Images [B, H, W, C] float in [0, 1] to logits [B, num_classes] float32.

    Attributes:
      activation: "relu", "swish" or "gelu".
      same_padding: as of `layers.padding_3x3`.
      sparse: whether `MeanSparse` follows each norm and each block.
    """

    activation: str = "relu"
    same_padding: bool = False
    sparse: bool = False

    def num_blocks(self) -> Sequence[int]:
        """Number of blocks of each group."""
        raise NotImplementedError

    def channels(self) -> Sequence[int]:
        """Channels of the first convolution, then of each group."""
        raise NotImplementedError

    def active(self) -> Callable[[jax.Array], jax.Array]:
        """The activation after each norm."""
        return ACTIVATIONS[self.activation]

    def classified(self, features: jax.Array) -> jax.Array:
        """Logits [B, num_classes] of pooled features [B, last width]."""
        return Dense(self.num_classes, name="fc")(features)

    def squeezed(self, width: int) -> int:
        """Channels of squeeze and excitation in blocks of a width; 0 for none."""
        return 0

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, features: bool = False
    ) -> jax.Array:
        """Logits, or the pooled features [B, last width] before them."""
        activation = self.active()
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        stem, *widths = self.channels()
        if self.same_padding:
            # Of odd sides a 3x3 convolution makes one pixel less than the 1x1 beside.
            unit = 2 ** (len(widths) - 1)
            check_sides(images, unit, "a network that pads as DeepMind's do")
        x = self.normalised(images)
        x = Conv(stem, 3, 1, 1, dtype=self.dtype, name="conv1")(x)
        for group, number in enumerate(self.num_blocks()):
            for index in range(number):
                x = block(
                    features=widths[group],
                    stride=2 if group > 0 and index == 0 else 1,
                    activation=activation,
                    dtype=self.dtype,
                    same_padding=self.same_padding,
                    squeeze=self.squeezed(widths[group]),
                    sparse=self.sparse,
                    name=f"block{group + 1}_{index}",
                )(x, train)
        x = batch_norm("bn1", train)(x)
        x = MeanSparse(name="sparse")(x) if self.sparse else x
        x = activation(x).mean(axis=(1, 2))
        return x if features else self.classified(x)


class WideResNet(PreActivated):
    """Three groups of as many blocks, each twice as wide as the one before.

    Attributes:
      depth: 6n + 4, number of convolutions.
      widen_factor: width k; the groups have 16k, 32k and 64k channels.
    """

    depth: int
    widen_factor: int

    def num_blocks(self) -> Sequence[int]:
        return ((self.depth - 4) // 6,) * 3

    def channels(self) -> Sequence[int]:
        return (16, *(self.widen_factor * width for width in (16, 32, 64)))


def build(
    config: ml_collections.ConfigDict, kind: type[WideResNet] = WideResNet
) -> WideResNet:
    """Builds a WideResNet from `config.model`, or one of a kind of them.

    Raises:
      UserError: depth not 6n + 4, no width, unknown activation.
    """
    check_size(config.depth, config.widen_factor)
    check_choice("model.activation", config.activation, ACTIVATIONS)
    return kind(**family.network_fields(config, "depth", "widen_factor", "activation"))


def check_size(depth: int, widen_factor: int) -> None:
    """Refuses what no WideResNet has.

    Raises:
      UserError: depth not 6n + 4, or no width.
    """
    if not 10 <= depth <= _DEEPEST or (depth - 4) % 6:
        raise UserError(
            f"model.depth is {depth}: a WideResNet has depth 6n + 4, such as 10, 16, "
            f"22, 28 or 34, and at most {_DEEPEST}."
        )
    if widen_factor < 1:
        raise UserError(f"model.widen_factor is {widen_factor}: it must be positive.")


def fields(shapes: family.Shapes, block: str) -> dict[str, Any]:
    """Depth and width that the shapes have.

    Args:
      shapes: by PyTorch name.
      block: first convolution of the first group's blocks, "{}" for their number.
    """
    width = family.outputs(shapes, block.format(0))
    blocks = family.count(shapes, block)
    return {"depth": 6 * blocks + 4, "widen_factor": max(width // 16, 1)}


def _unused(shapes: family.Shapes) -> tuple[set[str], str]:
    """The copy of the first group in TRADES' WideResNet and those derived from it.

    It has the names and shapes of `block1`. No forward pass uses it (Zhang et al.,
    2019).
    """
    twin = {n: shape for n, shape in shapes.items() if n.startswith("sub_block1.")}
    first = {f"sub_{n}": x for n, x in shapes.items() if n.startswith("block1.")}
    what = "a second block1 that no forward pass of TRADES' WideResNets uses"
    return set(twin) if twin == first else set(), f"under 'sub_block1.': {what}"


def _without_bias(shapes: family.Shapes) -> bool:
    return "fc.weight" in shapes and "fc.bias" not in shapes


def _arch(depth: int, widen_factor: int) -> dict[str, Any]:
    sizes = {"depth": depth, "widen_factor": widen_factor}
    return {**sizes, "num_classes": 10, **family.CIFAR10}


FAMILY = family.Family(
    build=build,
    sized_by=("depth", "widen_factor"),
    archs={
        "wrn16_4": _arch(16, 4),
        "wrn28_10": _arch(28, 10),
        "wrn34_10": _arch(34, 10),
        "wrn70_16": _arch(70, 16),
    },
    # The names of the usual implementation for small images.
    torch=family.TorchNames(
        rules=(
            ("conv1", "conv1"),
            ("block{g}.layer.{b}.conv{k}", "block{g}_{b}/conv{k}"),
            ("block{g}.layer.{b}.bn{k}", "block{g}_{b}/bn{k}"),
            ("block{g}.layer.{b}.convShortcut", "block{g}_{b}/shortcut"),
            ("bn1", "bn1"),
            ("fc", "fc"),
        ),
        mark="block1.layer.0.conv1.weight",
        first=("conv1.weight",),
        fields=partial(fields, block="block1.layer.{}.conv1.weight"),
        side=lambda model: 32,
        usual=lambda model: None,
        who="--normalization=none (TRADES, Carmon2019 and most WideResNets of "
        "RobustBench), --normalization=cifar10 (DAT, RATIO), --mean=0.5 --std=0.5 "
        "(Hendrycks2019) or --normalization=per_image (Ding2020)",
        look_alikes={"a WideResNet without a bias of its last layer": _without_bias},
        published="TRADES, MART, AWP, Carmon2019, Hendrycks2019 and others of "
        "RobustBench; DAT for CIFAR",
        unused=_unused,
    ),
)
