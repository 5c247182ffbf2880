"""WRN-A1 to A4 (Huang et al., 2022, Revisiting residual networks).

WideResNets with SiLU and groups of chosen depths and widths, and names of their own.
"""

from atebm_jax.models import family, ra_wide_resnet, robust_wide_resnet

FAMILY = family.Family(
    build=ra_wide_resnet.build_groups,
    sized_by=("blocks", "widths"),
    archs={
        "wrn_a4": {
            "blocks": "27-28-13",
            "widths": "16-160-448-384",
            "activation": "swish",
            "num_classes": 10,
            **family.DEEPMIND[10],
        },
    },
    torch=family.TorchNames(
        rules=robust_wide_resnet.rules("shortcut.0", "norm1"),
        published="Huang2022 (WRN-A4)",
        mark="blocks.1.layer.0.shortcut.0.weight",
        first=("stem_conv.weight",),
        fields=lambda shapes: ra_wide_resnet.fields(
            shapes, "stem_conv.weight", robust_wide_resnet.BLOCKS
        ),
        side=lambda model: 32,
        usual=lambda model: None,
        who="--normalization=none, or --mean=0.4914,0.4822,0.4465 "
        "--std=0.2471,0.2435,0.2616 (trained with further data)",
        activation="swish",
    ),
)
