"""Wide ResNets with sparse activations (MeanSparse; Amini et al., 2024).

Published networks are trained without: statistics and thresholds are added afterwards.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from atebm_jax.models import dm_wide_resnet, family, ra_wide_resnet

_RULES: family.Rules = (
    *dm_wide_resnet.block_rules(
        {f"meansparse_{place}": f"sparse{place + 1}" for place in range(3)}
    ),
    ("meansparse_end", "sparse"),
)


# Of each layer; of those of ConvNeXts also "momentum" and "epsilon".
_COUNTERS: dict[str, np.generic] = {
    "flag_update_statistics": np.int64(0),
    "batch_num": np.float32(0),
}


def unused(shapes: family.Shapes) -> tuple[set[str], str]:
    """What the authors' code needs while it gathers the statistics."""
    last = {*_COUNTERS, "momentum", "epsilon"}
    found = {name for name in shapes if name.rpartition(".")[2] in last}
    return found, "that only count while MeanSparse gathers its statistics"


def beside(
    arrays: Mapping[str, np.ndarray], **constants: float
) -> dict[str, np.ndarray]:
    """What `unused` drops, as the authors' code has it afterwards.

    Args:
      arrays: a network's weights and statistics by PyTorch name.
      constants: the numbers that each layer has beside.
    """
    layers = (n.removesuffix("threshold") for n in arrays if n.endswith("threshold"))
    values = _COUNTERS | {name: np.float32(x) for name, x in constants.items()}
    made = {f"{layer}{n}": np.asarray(x) for layer in layers for n, x in values.items()}
    return made | family.batch_counters(arrays)


def sparse(
    dense: family.Family,
    archs: Mapping[str, family.ModelFields],
    rules: family.Rules,
    **names: Any,
) -> family.Family:
    """The family of a dense one's networks with sparse activations.

    Args:
      dense: has names in PyTorch.
      archs: as of a family.
      rules: names of the statistics and thresholds in PyTorch, and ours.
      names: attributes of `family.TorchNames` that differ from the dense family's.
    """
    assert dense.torch is not None
    names = {"unused": unused, "beside": beside} | names
    return dataclasses.replace(
        dense,
        build=lambda model: dense.build(model).clone(sparse=True),
        archs=archs,
        compiled_share=family.MOST_KEPT,
        torch=dataclasses.replace(
            dense.torch, rules=(*rules, *dense.torch.rules), **names
        ),
    )


FAMILY = sparse(
    dm_wide_resnet.FAMILY,
    {
        "mean_sparse_wrn70_16": dm_wide_resnet.FAMILY.archs["dm_wrn70_16"],
        "mean_sparse_wrn94_16": dm_wide_resnet.FAMILY.archs["dm_wrn94_16"],
    },
    _RULES,
    mark="layer.0.block.0.meansparse_0.running_mean",
    published="Amini2024 (MeanSparse on Wang2023's and Bartoldson2024's networks)",
    look_alikes={},
)

RA_FAMILY = sparse(
    ra_wide_resnet.FAMILY,
    {"mean_sparse_ra_wrn70_16": ra_wide_resnet.FAMILY.archs["ra_wrn70_16"]},
    _RULES,
    # Dense ones have this array too, and are recognised before.
    mark="layer.0.block.0.se.fc1.bias",
    published="Amini2024 (MeanSparse on Peng2023's network for CIFAR-10)",
    look_alikes={},
)
