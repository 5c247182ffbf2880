"""DeepMind's PreActResNet (Rebuffi et al., 2021), RobustBench's "R18".

Its shortcuts are 3x3 convolutions of a block's input, and it pads as Haiku does.
"""

from typing import Any

from atebm_jax.models import dm_wide_resnet, family, preact_resnet

_LAYERS = {"batchnorm_0": "bn1", "conv_2d_1": "conv1", "batchnorm_1": "bn2"}
_LAYERS |= {"conv_2d_2": "conv2", "shortcut": "shortcut"}


def _arch(depth: int) -> dict[str, Any]:
    sizes = {"depth": depth, "activation": "swish"}
    return {**sizes, "num_classes": 10, **family.DEEPMIND[10]}


FAMILY = family.Family(
    build=lambda model: preact_resnet.build(model).clone(
        final_norm=True, shortcut="raw", shortcut_side=3, same_padding=True
    ),
    sized_by=("depth",),
    fields=preact_resnet.FAMILY.fields,
    archs={
        "dm_preact_resnet18": _arch(18),
        "dm_preact_resnet34": _arch(34),
    },
    torch=family.TorchNames(
        rules=(
            ("conv_2d", "conv1"),
            *family.block_rules("layer_{g0}.{b}", "layer{g}_{b}", _LAYERS, 4),
            ("batchnorm", "bn"),
            ("logits", "fc"),
        ),
        published="DeepMind's R18: Rebuffi2021, Gowal2021, Rade2021",
        mark="layer_0.0.conv_2d_1.weight",
        first=("conv_2d.weight",),
        fields=lambda shapes: preact_resnet.depth_of(
            shapes, "layer_{s}.{}.conv_2d_1.weight"
        ),
        side=lambda model: 32,
        usual=dm_wide_resnet.usual,
        who=dm_wide_resnet.WHO,
        activation="swish",
    ),
)
