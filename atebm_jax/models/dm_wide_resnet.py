"""DeepMind's WideResNet (Gowal et al., 2020): most robust classifiers of CIFAR.

It is a WideResNet with Swish that pads as Haiku does, and has names of its own in
PyTorch. Its authors and those after them normalise inside the network.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from atebm_jax.models import family, wide_resnet


def block_rules(layers: Mapping[str, str]) -> family.Rules:
    """The rules for layers of blocks, as of `family.block_rules`."""
    return family.block_rules("layer.{g0}.block.{b}", "block{g}_{b}", layers, 3)


RULES: family.Rules = (
    ("init_conv", "conv1"),
    *block_rules(
        {
            "batchnorm_0": "bn1",
            "conv_0": "conv1",
            "batchnorm_1": "bn2",
            "conv_1": "conv2",
            "shortcut": "shortcut",
        }
    ),
    ("batchnorm", "bn1"),
    ("logits", "fc"),
)


def usual(model: family.ModelFields) -> Mapping[str, tuple[float, ...]] | None:
    """The normalisation of CIFAR-10 or CIFAR-100, by the number of classes."""
    return family.DEEPMIND.get(model["num_classes"])


WHO = "the --mean and --std of the data it was trained on (10 and 100 classes: CIFAR's)"


def _arch(depth: int, widen_factor: int) -> dict[str, Any]:
    sizes = wide_resnet.arch(depth, widen_factor, family.DEEPMIND[10])
    return {**sizes, "activation": "swish"}


FAMILY = family.Family(
    build=lambda model: wide_resnet.build(model).clone(same_padding=True),
    sized_by=("depth", "widen_factor"),
    fields=wide_resnet.FAMILY.fields,
    archs={
        "dm_wrn28_10": _arch(28, 10),
        "dm_wrn34_10": _arch(34, 10),
        "dm_wrn34_20": _arch(34, 20),
        "dm_wrn70_16": _arch(70, 16),
        "dm_wrn82_8": _arch(82, 8),
        "dm_wrn94_16": _arch(94, 16),
        "dm_wrn106_16": _arch(106, 16),
    },
    compiled_share=0.5,
    # The names of the authors' PyTorch port, and of RobustBench.
    torch=family.TorchNames(
        rules=RULES,
        published="DeepMind's: Gowal2020, Gowal2021, Rebuffi2021, Rade2021, "
        "Pang2022, Wang2023, Bartoldson2024",
        mark="layer.0.block.0.conv_0.weight",
        first=("init_conv.weight",),
        fields=partial(wide_resnet.fields, block="layer.0.block.{}.conv_0.weight"),
        side=lambda model: 32,
        usual=usual,
        who=WHO,
        activation="swish",
    ),
)
