"""Pre-activation WideResNet for small images (Zagoruyko and Komodakis, 2016).

WRN-34-10 is the paper's CIFAR network. Depth is 6n + 4, the width any. The network
normalises its input, and its global average pooling fits any image size. Its options
are those of all families with norm and activation before each convolution.
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
    SqueezeExcitation,
    at_least_float32,
    batch_norm,
    check_sides,
    normed,
    sparsified,
)

# Tracing a deeper network would seem to hang; nobody trains one.
_DEEPEST = 1000

#: What a shortcut with a convolution sees: a block's input, or that after its first
#: norm and activation.
SHORTCUTS = ("active", "raw")


class Block(nn.Module):
    """Two 3x3 convolutions after norm and activation, with a shortcut.

    Where width or resolution changes, the shortcut is a convolution.

    Attributes:
      features: output channels.
      stride: of the first convolution and of the shortcut.
      others: as of `PreActivated`.
    """

    features: int
    stride: int
    activation: Callable[[jax.Array], jax.Array]
    dtype: Any
    same_padding: bool
    squeeze_ratio: float
    sparse: bool
    shortcut: str
    shortcut_side: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(Conv, self.features, dtype=self.dtype)
        around = (0, 1) if self.same_padding and self.stride == 2 else 1
        active = sparsified(batch_norm("bn1", train)(x), "sparse1", self)
        active = self.activation(active.astype(self.dtype))
        first = conv(3, self.stride, around, name="conv1")
        y = normed(first, batch_norm("bn2", train), active)
        y = sparsified(y, "sparse2", self).astype(self.dtype)
        y = conv(3, 1, 1, name="conv2")(self.activation(y))
        if self.squeeze_ratio:
            inside = max(round(self.squeeze_ratio * self.features), 1)
            y = SqueezeExcitation(inside, self.dtype, name="se")(y)
        if self.stride == 1 and x.shape[-1] == self.features:
            return sparsified(x + y, "sparse3", self)
        seen = x if self.shortcut == "raw" else active
        padding = around if self.shortcut_side == 3 else 0
        shortcut = conv(self.shortcut_side, self.stride, padding, name="shortcut")
        return sparsified(y + shortcut(seen), "sparse3", self)


class PreActivated(family.Network):
    """Groups of blocks, each group after the first at half the resolution.

    Images [B, H, W, C] float in [0, 1] to logits [B, num_classes] float32.

    Attributes:
      blocks: number of blocks of each group.
      widths: channels of the first convolution, then of each group.
      activation: "relu", "swish" or "gelu".
      same_padding: at stride 2, 3x3 convolutions pad below and on the right alone.
        Networks that were first written for TensorFlow or Haiku do so ("SAME", for even
        sides).
      squeeze_ratio: channels inside squeeze and excitation after a block's convolutions
        for one of the block; 0 for none.
      sparse: whether `MeanSparse` follows each norm and each block.
      shortcut: one of `SHORTCUTS`.
      shortcut_side: of the window of a shortcut with a convolution, 1 or 3.
      final_norm: norm and activation before the pooling.
      group_name, norm_name: what the parameters of groups and of that norm are called.
    """

    blocks: Sequence[int]
    widths: Sequence[int]
    activation: str = "relu"
    same_padding: bool = False
    squeeze_ratio: float = 0.0
    sparse: bool = False
    shortcut: str = "active"
    shortcut_side: int = 1
    final_norm: bool = True
    group_name: str = "block"
    norm_name: str = "bn1"

    def active(self) -> Callable[[jax.Array], jax.Array]:
        """The activation after each norm."""
        return ACTIVATIONS[self.activation]

    def classified(self, features: jax.Array) -> jax.Array:
        """Logits [B, num_classes] of pooled features [B, last width]."""
        return Dense(self.num_classes, name="fc")(features)

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, features: bool = False
    ) -> jax.Array:
        """Logits, or the pooled features [B, last width] before them."""
        activation = self.active()
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        stem, *widths = self.widths
        if self.same_padding:
            # Of odd sides a 3x3 convolution makes one pixel less than the 1x1 beside.
            unit = 2 ** (len(widths) - 1)
            check_sides(images, unit, "a network that pads as DeepMind's do")
        x = self.normalised(images)
        x = Conv(stem, 3, 1, 1, dtype=self.dtype, name="conv1")(x)
        for group, (number, width) in enumerate(zip(self.blocks, widths, strict=True)):
            for index in range(number):
                x = block(
                    features=width,
                    stride=2 if group > 0 and index == 0 else 1,
                    activation=activation,
                    dtype=self.dtype,
                    same_padding=self.same_padding,
                    squeeze_ratio=self.squeeze_ratio,
                    sparse=self.sparse,
                    shortcut=self.shortcut,
                    shortcut_side=self.shortcut_side,
                    name=f"{self.group_name}{group + 1}_{index}",
                )(x, train)
        x = at_least_float32(x)
        if self.final_norm:
            x = sparsified(batch_norm(self.norm_name, train)(x), "sparse", self)
            x = activation(x)
        x = x.mean(axis=(1, 2))
        return x if features else self.classified(x)


def network(
    depth: int,
    widen_factor: int,
    kind: type[PreActivated] = PreActivated,
    **fields: Any,
) -> PreActivated:
    """A WideResNet: three groups of as many blocks, each twice as wide as the last.

    Args:
      depth: 6n + 4, number of convolutions.
      widen_factor: width k; the groups have 16k, 32k and 64k channels.
      kind: what it is built as.
      fields: further attributes of `PreActivated`.
    """
    blocks = ((depth - 4) // 6,) * 3
    widths = (16, *(widen_factor * width for width in (16, 32, 64)))
    return kind(blocks, widths, **fields)


def build(
    config: ml_collections.ConfigDict, kind: type[PreActivated] = PreActivated
) -> PreActivated:
    """Builds a WideResNet from `config.model`, or one of a kind of them.

    Raises:
      UserError: depth not 6n + 4, no width, unknown activation.
    """
    check_size(config.depth, config.widen_factor)
    check_choice("model.activation", config.activation, ACTIVATIONS)
    fields = family.network_fields(config, "activation")
    return network(config.depth, config.widen_factor, kind, **fields)


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


def arch(
    depth: int, widen_factor: int, normalisation: family.ModelFields = family.CIFAR10
) -> dict[str, Any]:
    """What a usual WideResNet for 10 classes sets in `config.model`."""
    sizes = {"depth": depth, "widen_factor": widen_factor}
    return {**sizes, "num_classes": 10, **normalisation}


#: The names of the usual implementation for small images.
NAMES = family.TorchNames(
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
)

FAMILY = family.Family(
    build=build,
    sized_by=("depth", "widen_factor"),
    fields={
        # 6n + 4.
        "depth": 34,
        # The groups have 16, 32 and 64 times this many channels.
        "widen_factor": 10,
    },
    archs={
        "wrn16_4": arch(16, 4),
        "wrn28_10": arch(28, 10),
        "wrn34_10": arch(34, 10),
        "wrn70_16": arch(70, 16),
    },
    torch=NAMES,
)
