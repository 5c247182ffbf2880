"""Families of Flax networks by name: a config to a network, a network to logits."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from atebm_jax.errors import UserError, check_choice
from atebm_jax.models import convnext, resnet, swin, vit, wide_resnet, xcit
from atebm_jax.models.family import Family

#: Images [B, H, W, C] float in [0, 1] to logits [B, K].
LogitsFn = Callable[[jax.Array], jax.Array]

#: Families of networks by `config.model.name`. Your own network is one more entry.
FAMILIES: dict[str, Family] = {
    "wide_resnet": wide_resnet.FAMILY,
    "resnet": resnet.FAMILY,
    "convnext": convnext.FAMILY,
    "xcit": xcit.FAMILY,  # before the ViTs: it has the name of their mark too
    "vit": vit.FAMILY,
    "swin": swin.FAMILY,
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
