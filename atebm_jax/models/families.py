"""The table of the families: a line each."""

from atebm_jax.models import (
    convnext,
    cosine_wide_resnet,
    dm_preact_resnet,
    dm_wide_resnet,
    jem_wide_resnet,
    mean_sparse_imagenet,
    mean_sparse_wide_resnet,
    preact_resnet,
    pssilu_wide_resnet,
    ra_resnet,
    ra_wide_resnet,
    resnet,
    robust_wide_resnet,
    small_resnet,
    swin,
    vit,
    wide_resnet,
    xcit,
)
from atebm_jax.models.family import Family

#: Families of networks by `config.model.name`. Your own network is one more entry.
#: A checkpoint is of the first family whose mark it has: where a network has the names
#: of another and more, its line comes before the other's.
FAMILIES: dict[str, Family] = {
    "pssilu_wide_resnet": pssilu_wide_resnet.FAMILY,
    "wide_resnet": wide_resnet.FAMILY,
    "cosine_wide_resnet": cosine_wide_resnet.FAMILY,
    "ra_wide_resnet": ra_wide_resnet.FAMILY,
    "mean_sparse_ra_wide_resnet": mean_sparse_wide_resnet.RA_FAMILY,
    "mean_sparse_wide_resnet": mean_sparse_wide_resnet.FAMILY,
    "dm_wide_resnet": dm_wide_resnet.FAMILY,
    "dm_preact_resnet": dm_preact_resnet.FAMILY,
    "wrn_a": robust_wide_resnet.WRN_A_FAMILY,
    "robust_wide_resnet": robust_wide_resnet.FAMILY,
    "jem_wide_resnet": jem_wide_resnet.FAMILY,
    "small_resnet": small_resnet.FAMILY,
    "preact_resnet": preact_resnet.FAMILY,
    "resnet": resnet.FAMILY,
    "ra_resnet": ra_resnet.FAMILY,
    "mean_sparse_convnext": mean_sparse_imagenet.CONVNEXT_FAMILY,
    "convnext": convnext.FAMILY,
    "xcit": xcit.FAMILY,
    "vit": vit.FAMILY,
    "mean_sparse_swin": mean_sparse_imagenet.SWIN_FAMILY,
    "swin": swin.FAMILY,
}

#: The families of this package.
BUILT_IN = frozenset(FAMILIES)
