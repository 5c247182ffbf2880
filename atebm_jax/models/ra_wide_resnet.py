"""RaWideResNet for CIFAR (Peng et al., 2023, Robust principles).

Groups of different depths and widths behind a wide first convolution, with squeeze and
excitation (ratio 1/4) in every block. Padding and names are those of DeepMind's
WideResNet.
"""

from collections.abc import Sequence
from typing import Any

import ml_collections

from atebm_jax.errors import UserError, check_choice
from atebm_jax.models import dm_wide_resnet, family
from atebm_jax.models.layers import ACTIVATIONS
from atebm_jax.models.wide_resnet import PreActivated

# Squeeze and excitation has this share of a block's channels inside.
_RATIO = 0.25

# Tracing a deeper network would seem to hang.
_MOST_BLOCKS = 500


class RaWideResNet(PreActivated):
    """Three groups of any depths and widths.

    Attributes:
      blocks: number of blocks of each group.
      widths: channels of the first convolution, then of each group.
    """

    blocks: Sequence[int]
    widths: Sequence[int]

    def num_blocks(self) -> Sequence[int]:
        return self.blocks

    def channels(self) -> Sequence[int]:
        return self.widths

    def squeezed(self, width: int) -> int:
        return max(round(_RATIO * width), 1)


def build(config: ml_collections.ConfigDict) -> RaWideResNet:
    """Builds a RaWideResNet from `config.model`.

    Raises:
      UserError: no depths or widths, too many blocks, unknown activation.
    """
    blocks = _numbers("blocks", config.blocks, 3, "30-31-10")
    widths = _numbers("widths", config.widths, 4, "96-216-432-864")
    if sum(blocks) > _MOST_BLOCKS:
        raise UserError(
            f"model.blocks is {config.blocks}: at most {_MOST_BLOCKS} blocks are built."
        )
    check_choice("model.activation", config.activation, ACTIVATIONS)
    fields = family.network_fields(config, "activation")
    return RaWideResNet(blocks, widths, **fields, same_padding=True)


def _numbers(field: str, text: str, count: int, example: str) -> tuple[int, ...]:
    parts = text.split("-")
    if len(parts) != count or not all(p.isdecimal() and int(p) for p in parts):
        raise UserError(
            f"model.{field} is {text!r}: expected {count} positive numbers, such as "
            f"{example}."
        )
    return tuple(map(int, parts))


def _fields(shapes: family.Shapes) -> dict[str, Any]:
    blocks = [f"layer.{group}.block.{{}}.conv_0.weight" for group in range(3)]
    first = ["init_conv.weight", *(template.format(0) for template in blocks)]
    widths = [family.outputs(shapes, name) for name in first if name in shapes]
    return {
        "blocks": "-".join(str(family.count(shapes, name)) for name in blocks),
        "widths": "-".join(map(str, widths)),
    }


FAMILY = family.Family(
    build=build,
    sized_by=("blocks", "widths"),
    archs={
        "ra_wrn70_16": {
            "blocks": "30-31-10",
            "widths": "96-216-432-864",
            "activation": "swish",
            "num_classes": 10,
            **family.DEEPMIND[10],
        },
    },
    torch=family.TorchNames(
        rules=(
            *(
                (
                    f"layer.{group}.block.{{b}}.se.fc{{k}}",
                    f"block{group + 1}_{{b}}/se/fc{{k}}",
                )
                for group in range(3)
            ),
            *dm_wide_resnet.RULES,
        ),
        mark="layer.0.block.0.se.fc1.weight",
        first=("init_conv.weight",),
        fields=_fields,
        side=lambda model: 32,
        usual=dm_wide_resnet.usual,
        who=dm_wide_resnet.WHO,
        activation="swish",
    ),
)
