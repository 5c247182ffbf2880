"""WideResNets with groups of chosen depths and widths (Huang et al., 2021 and 2022).

WRN-34-R has fewer channels in its last group, which makes it more robust. WRN-A1 to A4
(Revisiting residual networks) have SiLU, and some names of their own.
"""

import dataclasses

from atebm_jax.models import family, ra_wide_resnet


def _rules(shortcut: str, last_norm: str) -> family.Rules:
    layers = {"bn{k}": "bn{k}", "conv{k}": "conv{k}", shortcut: "shortcut"}
    blocks = family.block_rules("blocks.{g0}.layer.{b}", "block{g}_{b}", layers, 3)
    return (("stem_conv", "conv1"), *blocks, (last_norm, "bn1"), ("fc", "fc"))


_BLOCKS = [f"blocks.{group}.layer.{{}}.conv1.weight" for group in range(3)]

_NAMES = family.TorchNames(
    rules=_rules("convShortcut", "bn1"),
    published="Huang2021 (WRN-34-R)",
    mark="blocks.0.layer.0.conv1.weight",
    first=("stem_conv.weight",),
    fields=lambda shapes: ra_wide_resnet.fields(shapes, "stem_conv.weight", _BLOCKS),
    side=lambda model: 32,
    usual=lambda model: family.AS_THEY_ARE,
)

FAMILY = family.Family(
    build=ra_wide_resnet.build_groups,
    sized_by=("blocks", "widths"),
    fields=ra_wide_resnet.FAMILY.fields,
    archs={
        "wrn34_r": {
            "blocks": "5-5-5",
            "widths": "16-320-640-512",
            "num_classes": 10,
            **family.AS_THEY_ARE,
        },
    },
    torch=_NAMES,
)

WRN_A_FAMILY = family.Family(
    build=ra_wide_resnet.build_groups,
    sized_by=("blocks", "widths"),
    fields=ra_wide_resnet.FAMILY.fields,
    archs={
        "wrn_a4": {
            "blocks": "27-28-13",
            "widths": "16-160-448-384",
            "activation": "swish",
            "num_classes": 10,
            **family.DEEPMIND[10],
        },
    },
    torch=dataclasses.replace(
        _NAMES,
        rules=_rules("shortcut.0", "norm1"),
        published="Huang2022 (WRN-A4)",
        mark="blocks.1.layer.0.shortcut.0.weight",
        usual=lambda model: None,
        who="--normalization=none, or --mean=0.4914,0.4822,0.4465 "
        "--std=0.2471,0.2435,0.2616 (trained with further data)",
        activation="swish",
    ),
)
