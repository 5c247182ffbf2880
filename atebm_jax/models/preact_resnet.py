"""Pre-activation ResNets for small images (He et al., 2016, Identity mappings).

PreActResNet-18 is the network of Rice et al. (2020), Wong et al. (2020) and many after
them. They differ in two things that are options here.
"""

from typing import Any

import ml_collections

from atebm_jax.errors import UserError, check_choice
from atebm_jax.models import family
from atebm_jax.models.layers import ACTIVATIONS
from atebm_jax.models.wide_resnet import SHORTCUTS, PreActivated

# Blocks of each of the four stages.
STAGES: dict[int, tuple[int, ...]] = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}

# Channels of the first convolution, then of each stage.
_WIDTHS = (64, 64, 128, 256, 512)


def build(config: ml_collections.ConfigDict) -> PreActivated:
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
    fields = family.network_fields(config, "activation", "final_norm", "shortcut")
    fields |= {"group_name": "layer", "norm_name": "bn"}
    return PreActivated(STAGES[config.depth], _WIDTHS, **fields)


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
    fields={
        # 18 or 34.
        "depth": 34,
        # Whether a norm comes before the pooling.
        "final_norm": True,
        # What shortcuts with a convolution see: "active", the input after norm and
        # activation, or "raw".
        "shortcut": "active",
    },
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
