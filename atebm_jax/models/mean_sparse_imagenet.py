"""ConvNeXts and Swins with sparse activations (MeanSparse; Amini et al., 2024).

Published networks are trained without: statistics and thresholds are added afterwards.
"""

import dataclasses
from functools import partial

import ml_collections

from atebm_jax.models import convnext, family, mean_sparse_wide_resnet, swin


def build_convnext(config: ml_collections.ConfigDict) -> convnext.ConvNeXt:
    """Builds a sparse ConvNeXt from `config.model`.

    Raises:
      UserError: as of `convnext.build`.
    """
    return convnext.build(config).clone(sparse=True)


def build_swin(config: ml_collections.ConfigDict) -> swin.Swin:
    """Builds a sparse Swin transformer from `config.model`.

    Raises:
      UserError: as of `swin.build`.
    """
    return swin.build(config).clone(sparse=True)


assert convnext.FAMILY.torch is not None and swin.FAMILY.torch is not None

CONVNEXT_FAMILY = dataclasses.replace(
    convnext.FAMILY,
    build=build_convnext,
    archs={
        "mean_sparse_convnext_large": {
            **convnext.FAMILY.archs["convnext_large"],
            **family.IMAGENET,
        }
    },
    torch=dataclasses.replace(
        convnext.FAMILY.torch,
        rules=(
            ("stages.{s}.blocks.{b}.mlp.act.0", "stage{s}_{b}/sparse1"),
            ("stages.{s}.blocks.{b}.drop_path.1", "stage{s}_{b}/sparse2"),
            *convnext.FAMILY.torch.rules,
        ),
        mark="stages.0.blocks.0.mlp.act.0.running_mean",
        usual=lambda model: family.IMAGENET,
        who="",
        aliases=(),
        unused=mean_sparse_wide_resnet.unused,
        beside=partial(mean_sparse_wide_resnet.beside, momentum=0.1, epsilon=1e-10),
        published="Amini2024 (MeanSparse on Liu2023's network)",
    ),
)

SWIN_FAMILY = dataclasses.replace(
    swin.FAMILY,
    build=build_swin,
    archs={"mean_sparse_swin_l": swin.FAMILY.archs["swin_l"]},
    torch=dataclasses.replace(
        swin.FAMILY.torch,
        rules=(
            ("layers.{s}.blocks.{b}.meansparse{k}", "stage{s}_{b}/sparse{k}"),
            ("layers.{s}.blocks.{b}.mlp.meansparse{k}", "stage{s}_{b}/inner_sparse{k}"),
            *swin.FAMILY.torch.rules,
        ),
        mark="layers.0.blocks.0.meansparse1.running_mean",
        usual=lambda model: family.IMAGENET,
        who="",
        aliases=(),
        unused=mean_sparse_wide_resnet.unused,
        beside=mean_sparse_wide_resnet.beside,
        published="Amini2024 (MeanSparse on Liu2023's network)",
    ),
)
