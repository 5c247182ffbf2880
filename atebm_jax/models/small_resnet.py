"""ResNets for small images (He et al., 2016): a 3x3 stem with stride 1, no pooling.

RATIO's, those of the robustness library for CIFAR and RobustBench's are such networks.
"""

from typing import Any

from atebm_jax.models import family, resnet


def _arch(depth: int) -> dict[str, Any]:
    sizes = {"depth": depth, "base_width": 64}
    return {**sizes, "num_classes": 10, **family.CIFAR10}


FAMILY = family.Family(
    build=lambda model: resnet.build(model).clone(small=True),
    sized_by=("depth", "base_width"),
    fields=resnet.FAMILY.fields,
    archs={
        "small_resnet18": _arch(18),
        "small_resnet34": _arch(34),
        "small_resnet50": _arch(50),
    },
    # The names of pytorch-cifar, which the others keep.
    torch=family.TorchNames(
        rules=(
            ("conv1", "conv1"),
            ("bn1", "bn1"),
            ("layer{s}.{b}.conv{k}", "layer{s}_{b}/conv{k}"),
            ("layer{s}.{b}.bn{k}", "layer{s}_{b}/bn{k}"),
            ("layer{s}.{b}.shortcut.0", "layer{s}_{b}/shortcut"),
            ("layer{s}.{b}.shortcut.1", "layer{s}_{b}/shortcut_bn"),
            ("linear", "fc"),
        ),
        published="RATIO, Engstrom2019 (robustness library), Sehwag2021, Addepalli2022",
        mark="layer2.0.shortcut.1.weight",
        first=("conv1.weight",),
        fields=resnet.fields,
        side=lambda model: 32,
        usual=lambda model: None,
        who="--normalization=none (Sehwag2021, Addepalli2021), --normalization=cifar10 "
        "(RATIO) or --mean=0.4914,0.4822,0.4465 --std=0.2023,0.1994,0.2010 (the "
        "robustness library)",
        aliases=(("fc.{leaf}", "linear.{leaf}"),),
    ),
)
