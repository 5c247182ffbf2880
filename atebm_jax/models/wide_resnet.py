"""Pre-activation WideResNet for small images (Zagoruyko and Komodakis, 2016).

WRN-34-10 is the paper's CIFAR network. Depth is 6n + 4, the width any. The network
normalises its input, and its global average pooling fits any image size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import ml_collections

from atebm_jax.errors import UserError, check_choice
from atebm_jax.models import family
from atebm_jax.models.layers import ACTIVATIONS, Conv, Dense, batch_norm, normed

# Tracing a deeper network would seem to hang; nobody trains one.
_DEEPEST = 1000


class Block(nn.Module):
    """Two 3x3 convolutions after norm and activation, with a shortcut.

    Where the width changes, the shortcut is a 1x1 convolution of the activated input.
    """

    features: int
    stride: int
    activation: Callable[[jax.Array], jax.Array]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(Conv, self.features, dtype=self.dtype)
        active = self.activation(batch_norm("bn1", train)(x).astype(self.dtype))
        first = conv(3, self.stride, 1, name="conv1")
        y = normed(first, batch_norm("bn2", train), active).astype(self.dtype)
        y = self.activation(y)
        y = conv(3, 1, 1, name="conv2")(y)
        if x.shape[-1] == self.features:
            return x + y
        return y + conv(1, self.stride, name="shortcut")(active)


class WideResNet(family.Network):
    """Images [B, H, W, C] float in [0, 1] to logits [B, num_classes] float32.

    Attributes:
      depth: 6n + 4, number of convolutions.
      widen_factor: width k; the groups have 16k, 32k and 64k channels.
      activation: "relu", "swish" or "gelu".
    """

    depth: int
    widen_factor: int
    activation: str = "relu"

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, features: bool = False
    ) -> jax.Array:
        """Logits, or the pooled features [B, 64 k] before them."""
        activation = ACTIVATIONS[self.activation]
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        x = self.normalised(images)
        x = Conv(16, 3, 1, 1, dtype=self.dtype, name="conv1")(x)
        for group, stride in enumerate((1, 2, 2)):
            for index in range((self.depth - 4) // 6):
                x = block(
                    features=16 * self.widen_factor * 2**group,
                    stride=stride if index == 0 else 1,
                    activation=activation,
                    dtype=self.dtype,
                    name=f"block{group + 1}_{index}",
                )(x, train)
        x = activation(batch_norm("bn1", train)(x)).mean(axis=(1, 2))
        return x if features else Dense(self.num_classes, name="fc")(x)


def build(config: ml_collections.ConfigDict) -> WideResNet:
    """Builds a WideResNet from `config.model`.

    Raises:
      UserError: depth not 6n + 4, no width, unknown activation.
    """
    if not 10 <= config.depth <= _DEEPEST or (config.depth - 4) % 6:
        raise UserError(
            f"model.depth is {config.depth}: a WideResNet has depth 6n + 4, such as "
            f"10, 16, 22, 28 or 34, and at most {_DEEPEST}."
        )
    if config.widen_factor < 1:
        raise UserError(
            f"model.widen_factor is {config.widen_factor}: it must be positive."
        )
    check_choice("model.activation", config.activation, ACTIVATIONS)
    return WideResNet(
        **family.network_fields(config, "depth", "widen_factor", "activation")
    )


def _fields(shapes: family.Shapes) -> dict[str, Any]:
    width = family.outputs(shapes, "block1.layer.0.conv1.weight")
    blocks = family.count(shapes, "block1.layer.{}.conv1.weight")
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
        fields=_fields,
        side=lambda model: 32,
        usual=lambda model: None,
        who="--normalization=none (TRADES, Carmon2019 and most WideResNets of "
        "RobustBench), --normalization=cifar10 (DAT, RATIO) or --mean=0.5 --std=0.5 "
        "(Hendrycks2019)",
        unused=_unused,
        look_alikes={
            "DeepMind's WideResNet (Gowal2020, Rebuffi2021, Wang2023)": (
                r"init_conv\.weight|layer\.\d+\.block\.\d+\.conv_0\.weight"
            ),
        },
    ),
)
