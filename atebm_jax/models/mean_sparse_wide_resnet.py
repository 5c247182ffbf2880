"""Wide ResNets with sparse activations (MeanSparse; Amini et al., 2024).

Published networks are trained without: statistics and thresholds are added afterwards.
"""

import dataclasses
from collections.abc import Mapping

import ml_collections
import numpy as np

from atebm_jax.models import dm_wide_resnet, family, ra_wide_resnet, wide_resnet


def build(config: ml_collections.ConfigDict) -> wide_resnet.WideResNet:
    """Builds a sparse DeepMind WideResNet from `config.model`.

    Raises:
      UserError: as of `wide_resnet.build`.
    """
    return dm_wide_resnet.build(config).clone(sparse=True)


def build_ra(config: ml_collections.ConfigDict) -> ra_wide_resnet.RaWideResNet:
    """Builds a sparse RaWideResNet from `config.model`.

    Raises:
      UserError: as of `ra_wide_resnet.build`.
    """
    return ra_wide_resnet.build(config).clone(sparse=True)


def _rules() -> family.Rules:
    """PyTorch's names number groups and a block's layers from 0, ours from 1."""
    blocks = tuple(
        (
            f"layer.{group}.block.{{b}}.meansparse_{place}",
            f"block{group + 1}_{{b}}/sparse{place + 1}",
        )
        for group in range(3)
        for place in range(3)
    )
    return (*blocks, ("meansparse_end", "sparse"))


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


def _names(dense: family.Family, mark: str, published: str) -> family.TorchNames:
    """Those of the dense network, and those of statistics and thresholds."""
    assert dense.torch is not None
    return dataclasses.replace(
        dense.torch,
        rules=(*_rules(), *dense.torch.rules),
        mark=mark,
        published=published,
        unused=unused,
        beside=beside,
        look_alikes={},
    )


FAMILY = family.Family(
    build=build,
    sized_by=("depth", "widen_factor"),
    archs={
        "mean_sparse_wrn70_16": dm_wide_resnet.FAMILY.archs["dm_wrn70_16"],
        "mean_sparse_wrn94_16": dm_wide_resnet.FAMILY.archs["dm_wrn94_16"],
    },
    torch=_names(
        dm_wide_resnet.FAMILY,
        "layer.0.block.0.meansparse_0.running_mean",
        "Amini2024 (MeanSparse on Wang2023's and Bartoldson2024's networks)",
    ),
)

RA_FAMILY = family.Family(
    build=build_ra,
    sized_by=("blocks", "widths"),
    archs={"mean_sparse_ra_wrn70_16": ra_wide_resnet.FAMILY.archs["ra_wrn70_16"]},
    torch=_names(
        ra_wide_resnet.FAMILY,
        # Dense ones have this array too, and are recognised before.
        "layer.0.block.0.se.fc1.bias",
        "Amini2024 (MeanSparse on Peng2023's network for CIFAR-10)",
    ),
)
