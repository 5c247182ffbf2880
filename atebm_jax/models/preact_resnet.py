"""Pre-activation ResNets for small images (He et al., 2016, Identity mappings).

PreActResNet-18 is the network of Rice et al. (2020), Wong et al. (2020) and many after
them. They differ in two things that are options here.
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
    check_sides,
    normed,
    padding_3x3,
)

# Blocks of each of the four stages.
STAGES: dict[int, tuple[int, ...]] = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}

#: What a shortcut with a convolution sees: a block's input, or that after its first
#: norm and activation.
SHORTCUTS = ("active", "raw")


class Block(nn.Module):
    """Two 3x3 convolutions after norm and activation, with a shortcut.

    Attributes:
      features: output channels.
      stride: of the first convolution and of the shortcut.
      shortcut: one of `SHORTCUTS`.
      deepmind: as of `PreActResNet`.
    """

    features: int
    stride: int
    activation: Callable[[jax.Array], jax.Array]
    dtype: Any
    shortcut: str
    deepmind: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(Conv, self.features, dtype=self.dtype)
        around = padding_3x3(self.stride, self.deepmind)
        active = self.activation(batch_norm("bn1", train)(x).astype(self.dtype))
        first = conv(3, self.stride, around, name="conv1")
        y = normed(first, batch_norm("bn2", train), active).astype(self.dtype)
        y = conv(3, 1, 1, name="conv2")(self.activation(y))
        if self.stride == 1 and x.shape[-1] == self.features:
            return x + y
        seen = x if self.shortcut == "raw" else active
        if self.deepmind:
            return y + conv(3, self.stride, around, name="shortcut")(seen)
        return y + conv(1, self.stride, name="shortcut")(seen)


class PreActResNet(family.Network):
    """Images [B, H, W, C] float in [0, 1] to logits [B, num_classes] float32.

    Attributes:
      depth: 18 or 34.
      activation: "relu", "swish" or "gelu".
      final_norm: norm and activation before the pooling.
      shortcut: one of `SHORTCUTS`.
      deepmind: padding as of `layers.padding_3x3`, and 3x3 windows of the shortcuts.
    """

    depth: int
    activation: str = "relu"
    final_norm: bool = True
    shortcut: str = "active"
    deepmind: bool = False

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, features: bool = False
    ) -> jax.Array:
        """Logits, or the pooled features [B, 512] before them."""
        activation = ACTIVATIONS[self.activation]
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        if self.deepmind:
            check_sides(images, 8, "a network that pads as DeepMind's do")
        x = self.normalised(images)
        x = Conv(64, 3, 1, 1, dtype=self.dtype, name="conv1")(x)
        for stage, num_blocks in enumerate(STAGES[self.depth]):
            for index in range(num_blocks):
                x = block(
                    features=64 * 2**stage,
                    stride=2 if stage > 0 and index == 0 else 1,
                    activation=activation,
                    dtype=self.dtype,
                    shortcut=self.shortcut,
                    deepmind=self.deepmind,
                    name=f"layer{stage + 1}_{index}",
                )(x, train)
        x = at_least_float32(x)
        if self.final_norm:
            x = activation(batch_norm("bn", train)(x))
        x = x.mean(axis=(1, 2))
        return x if features else Dense(self.num_classes, name="fc")(x)


def build(config: ml_collections.ConfigDict) -> PreActResNet:
    """Builds a PreActResNet from `config.model`.

    Raises:
      UserError: unknown depth, shortcut or activation.
    """
    if config.depth not in STAGES:
        raise UserError(
            f"model.depth is {config.depth}: a PreActResNet has depth "
            f"{' or '.join(map(str, STAGES))}."
        )
    check_choice("model.shortcut", config.shortcut, SHORTCUTS)
    check_choice("model.activation", config.activation, ACTIVATIONS)
    own = ("depth", "activation", "final_norm", "shortcut")
    return PreActResNet(**family.network_fields(config, *own))


def depth_of(shapes: family.Shapes, template: str) -> dict[str, int]:
    """{"depth": ...}; {} if there is none with as many blocks in the stages.

    Args:
      template: name of an array of a block, with stages and blocks as "{s}" and "{}".
    """
    if any("conv3" in name for name in shapes):
        return {}
    stages = [template.replace("{s}", str(stage)) for stage in range(5)]
    found = [family.count(shapes, stage) for stage in stages]
    blocks = tuple(number for number in found if number)
    return next(({"depth": d} for d, known in STAGES.items() if known == blocks), {})


def _fields(shapes: family.Shapes) -> dict[str, Any]:
    final_norm = "bn.weight" in shapes
    # True of all networks of RobustBench.
    shortcut = "active" if final_norm else "raw"
    found = depth_of(shapes, "layer{s}.{}.conv1.weight")
    return found | {"final_norm": final_norm, "shortcut": shortcut}


def _arch(final_norm: bool, shortcut: str) -> dict[str, Any]:
    options = {"depth": 18, "final_norm": final_norm, "shortcut": shortcut}
    return {**options, "num_classes": 10, **family.DEEPMIND[10]}


FAMILY = family.Family(
    build=build,
    sized_by=("depth", "final_norm", "shortcut"),
    archs={
        # Rice2020, Kireev2021, Addepalli2021.
        "preact_resnet18": _arch(True, "active"),
        "preact_resnet18_raw": _arch(True, "raw"),
        # pytorch-cifar's.
        "preact_resnet18_nonorm": _arch(False, "active"),
        # Wong2020, Andriushchenko2020.
        "preact_resnet18_nonorm_raw": _arch(False, "raw"),
    },
    # The names of pytorch-cifar, robust_overfitting and RobustBench.
    torch=family.TorchNames(
        rules=(
            ("conv1", "conv1"),
            ("layer{s}.{b}.bn{k}", "layer{s}_{b}/bn{k}"),
            ("layer{s}.{b}.conv{k}", "layer{s}_{b}/conv{k}"),
            ("layer{s}.{b}.shortcut.0", "layer{s}_{b}/shortcut"),
            ("bn", "bn"),
            ("linear", "fc"),
        ),
        published="robust_overfitting, Rice2020, Wong2020, Andriushchenko2020, "
        "Addepalli2021",
        mark="layer2.0.shortcut.0.weight",
        first=("conv1.weight",),
        fields=_fields,
        side=lambda model: 32,
        usual=lambda model: None,
        who="--normalization=none (Andriushchenko2020, Addepalli2021) or "
        "--mean=0.4914,0.4822,0.4465 --std=0.2471,0.2435,0.2616 (Rice2020, Wong2020)",
        unsaid=lambda fields: {
            "shortcut": "--arch=preact_resnet18, preact_resnet18_raw, "
            "preact_resnet18_nonorm or preact_resnet18_nonorm_raw gives another"
        },
    ),
)
