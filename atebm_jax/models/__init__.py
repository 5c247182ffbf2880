"""Families of Flax networks by name: a config to a network, a network to logits."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from atebm_jax.errors import UserError, check_choice
from atebm_jax.models import (
    convnext,
    dm_preact_resnet,
    dm_wide_resnet,
    jem_wide_resnet,
    preact_resnet,
    ra_resnet,
    ra_wide_resnet,
    resnet,
    robust_wide_resnet,
    small_resnet,
    vit,
    wide_resnet,
    wrn_a,
)
from atebm_jax.models.family import Family

#: Images [B, H, W, C] float in [0, 1] to logits [B, K].
LogitsFn = Callable[[jax.Array], jax.Array]

#: Families of networks by `config.model.name`. Your own network is one more entry.
#: A checkpoint is of the first family whose mark it has: where a network has the names
#: of another and more, its line comes before the other's.
FAMILIES: dict[str, Family] = {
    "wide_resnet": wide_resnet.FAMILY,
    "ra_wide_resnet": ra_wide_resnet.FAMILY,
    "dm_wide_resnet": dm_wide_resnet.FAMILY,
    "dm_preact_resnet": dm_preact_resnet.FAMILY,
    "wrn_a": wrn_a.FAMILY,
    "robust_wide_resnet": robust_wide_resnet.FAMILY,
    "jem_wide_resnet": jem_wide_resnet.FAMILY,
    "small_resnet": small_resnet.FAMILY,
    "preact_resnet": preact_resnet.FAMILY,
    "resnet": resnet.FAMILY,
    "ra_resnet": ra_resnet.FAMILY,
    "convnext": convnext.FAMILY,
    "vit": vit.FAMILY,
}

#: The families of this package.
BUILT_IN = frozenset(FAMILIES)

DTYPES = ("float32", "bfloat16")


def build(config: ml_collections.ConfigDict) -> nn.Module:
    """Builds the network that `config.model` describes.

    Every network maps images [B, H, W, C] float in [0, 1] to logits [B, K] float32 and
    takes `train: bool` (batch statistics) and `features: bool` (pooled features).

    Args:
      config: `config.model`, with the family's key of `FAMILIES` in `name`.

    Raises:
      UserError: unknown family or dtype, no classes, or a value that the family
        refuses.
    """
    check_choice("model.name", config.name, FAMILIES)
    check_choice("model.dtype", config.dtype, DTYPES)
    if config.num_classes < 1:
        raise UserError(
            f"model.num_classes is {config.num_classes}: it must be positive."
        )
    return FAMILIES[config.name].build(config)


def variable_shapes(model: nn.Module, image_shape: Sequence[int]) -> Any:
    """Shapes and dtypes of a network's variables for images [H, W, C]."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def logits_fn(model: nn.Module, variables: Any) -> LogitsFn:
    """The network in evaluation mode: images [B, H, W, C] -> logits [B, K].

    Normalisation layers use the running statistics in `variables`.
    """

    def apply(images: jax.Array) -> jax.Array:
        logits = model.apply(variables, images)
        assert isinstance(logits, jax.Array)
        return logits

    return apply
