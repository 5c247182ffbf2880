"""ConvNeXts and Swins with sparse activations (MeanSparse; Amini et al., 2024)."""

from functools import partial
from typing import Any

from atebm_jax.models import convnext, family, mean_sparse_wide_resnet, swin

_PUBLISHED: dict[str, Any] = {
    "usual": lambda model: family.IMAGENET,
    "who": "",
    "aliases": (),
    "published": "Amini2024 (MeanSparse on Liu2023's network)",
}

CONVNEXT_FAMILY = mean_sparse_wide_resnet.sparse(
    convnext.FAMILY,
    {
        "mean_sparse_convnext_large": {
            **convnext.FAMILY.archs["convnext_large"],
            **family.IMAGENET,
        }
    },
    (
        ("stages.{s}.blocks.{b}.mlp.act.0", "stage{s}_{b}/sparse1"),
        ("stages.{s}.blocks.{b}.drop_path.1", "stage{s}_{b}/sparse2"),
    ),
    mark="stages.0.blocks.0.mlp.act.0.running_mean",
    beside=partial(mean_sparse_wide_resnet.beside, momentum=0.1, epsilon=1e-10),
    **_PUBLISHED,
)

SWIN_FAMILY = mean_sparse_wide_resnet.sparse(
    swin.FAMILY,
    {"mean_sparse_swin_l": swin.FAMILY.archs["swin_l"]},
    (
        ("layers.{s}.blocks.{b}.meansparse{k}", "stage{s}_{b}/sparse{k}"),
        ("layers.{s}.blocks.{b}.mlp.meansparse{k}", "stage{s}_{b}/inner_sparse{k}"),
    ),
    mark="layers.0.blocks.0.meansparse1.running_mean",
    **_PUBLISHED,
)
