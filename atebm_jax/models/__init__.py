"""Families of Flax networks by name, and how a config and logits come of them."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import ml_collections

from atebm_jax.errors import UserError
from atebm_jax.models import convnext, resnet, vit, wide_resnet
from atebm_jax.models.layers import conv_function

#: Images [B, H, W, C] float in [0, 1] to logits [B, K].
LogitsFn = Callable[[jax.Array], jax.Array]

#: Families of networks by `config.model.name`; add one for a network of your own.
MODELS: dict[str, Callable[[ml_collections.ConfigDict], nn.Module]] = {
    "wide_resnet": wide_resnet.build,
    "resnet": resnet.build,
    "convnext": convnext.build,
    "vit": vit.build,
}

DTYPES = ("float32", "bfloat16")


def build(config: ml_collections.ConfigDict) -> nn.Module:
    """Builds the network that `config.model` describes.

    Every network maps images [B, H, W, C] float in [0, 1] to logits [B, K] float32 and
    takes `train: bool` (batch statistics) and `features: bool` (pooled features).

    Args:
      config: `config.model`, with the family's key of `MODELS` in `name`.

    Raises:
      UserError: unknown family, dtype or convolution gradient, or a value that the
        family refuses.
    """
    if config.name not in MODELS:
        raise UserError(
            f"unknown model.name {config.name!r}: choose one of {', '.join(MODELS)}."
        )
    if config.dtype not in DTYPES:
        raise UserError(
            f"unknown model.dtype {config.dtype!r}: choose one of {', '.join(DTYPES)}."
        )
    conv_function(config.conv_gradient)
    return MODELS[config.name](config)


def logits_fn(model: nn.Module, variables: Any) -> LogitsFn:
    """The network in evaluation mode: images [B, H, W, C] -> logits [B, K].

    Normalisation layers use the running statistics in `variables` and leave them.
    """

    def apply(images: jax.Array) -> jax.Array:
        logits = model.apply(variables, images)
        assert isinstance(logits, jax.Array)
        return logits

    return apply
