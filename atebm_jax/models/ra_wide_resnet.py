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

# Tracing a deeper network would seem to hang.
_MOST_BLOCKS = 500


def build_groups(config: ml_collections.ConfigDict) -> PreActivated:
    """Builds three groups of any depths and widths from `config.model`.

    Raises:
      UserError: no depths or widths, too many blocks, unknown activation.
    """
    blocks, widths = sizes(config.blocks, config.widths, 3)
    check_choice("model.activation", config.activation, ACTIVATIONS)
    return PreActivated(blocks, widths, **family.network_fields(config, "activation"))


def sizes(
    blocks: str, widths: str, groups: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of `config.model.blocks` ("30-31-10") and `widths` ("96-216-432-864").

    Raises:
      UserError: not one positive number a group, and one width more; too many blocks.
    """
    found = []
    for name, text, count in (
        ("blocks", blocks, groups),
        ("widths", widths, groups + 1),
    ):
        parts = text.split("-")
        if len(parts) != count or not all(p.isdecimal() and int(p) for p in parts):
            raise UserError(
                f"model.{name} is {text!r}: expected {count} positive numbers with "
                f"'-' between, such as {'-'.join(['16'] * count)}."
            )
        found.append(tuple(map(int, parts)))
    if sum(found[0]) > _MOST_BLOCKS:
        raise UserError(
            f"model.blocks is {blocks}: at most {_MOST_BLOCKS} blocks are built."
        )
    return found[0], found[1]


def fields(shapes: family.Shapes, first: str, blocks: Sequence[str]) -> dict[str, Any]:
    """`blocks` and `widths` that the shapes have.

    Args:
      first: name of the first convolution.
      blocks: names of a convolution with a block's outputs, one a group, with "{}" for
        the block's number.
    """
    names = [first, *(template.format(0) for template in blocks)]
    widths = [family.outputs(shapes, name) for name in names if name in shapes]
    return {
        "blocks": "-".join(str(family.count(shapes, name)) for name in blocks),
        "widths": "-".join(map(str, widths)),
    }


_BLOCKS = [f"layer.{group}.block.{{}}.conv_0.weight" for group in range(3)]

FAMILY = family.Family(
    build=lambda model: build_groups(model).clone(
        same_padding=True, squeeze_ratio=0.25
    ),
    sized_by=("blocks", "widths"),
    fields={
        # Of each group.
        "blocks": "30-31-10",
        # Channels of the first convolution, then of each group.
        "widths": "96-216-432-864",
    },
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
            *dm_wide_resnet.block_rules({"se.fc{k}": "se/fc{k}"}),
            *dm_wide_resnet.RULES,
        ),
        published="Peng2023 for CIFAR-10",
        mark="layer.0.block.0.se.fc1.weight",
        first=("init_conv.weight",),
        fields=lambda shapes: fields(shapes, "init_conv.weight", _BLOCKS),
        side=lambda model: 32,
        usual=dm_wide_resnet.usual,
        who=dm_wide_resnet.WHO,
        activation="swish",
        look_alikes={
            "a network with sparse activations (MeanSparse)": r"meansparse_end\..*"
        },
    ),
)
