"""Families of Flax networks by name: a config to a network, a network to logits."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from atebm_jax.errors import UserError, check_choice
from atebm_jax.models.families import BUILT_IN, FAMILIES
from atebm_jax.models.layers import FROZEN

__all__ = ["BUILT_IN", "DTYPES", "FAMILIES", "LogitsFn"]
__all__ += ["build", "freeze", "logits_fn", "one_pass", "prepare", "variable_shapes"]

#: Images [B, H, W, C] float in [0, 1] to logits [B, K].
LogitsFn = Callable[[jax.Array], jax.Array]

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


def prepare(model: nn.Module, variables: Any, image_shape: Sequence[int]) -> Any:
    """Makes once what layers need of the weights alone, for `model.apply`.

    Call it outside of the loops that differentiate by images: compilers do not move all
    of it out of them. Made are kernels in the compute dtype, with the normalisation
    after them folded in, and the scale and shift of the other normalisations.

    Args:
      model: a network of `build`; of any other one only its layers from `layers`.
      variables: its weights and running statistics.
      image_shape: [H, W, C] of the images to come.

    Returns:
      The variables with the collection `layers.FROZEN` beside them.
    """

    def made(variables: Any) -> Any:
        # The compiler drops the pass itself, as nobody reads its logits.
        blank = jnp.zeros((1, *image_shape), jnp.float32)
        return model.apply(variables, blank, mutable=[FROZEN])[1]

    return {**variables, **jax.jit(made)(variables)}


def freeze(model: nn.Module, variables: Any, image_shape: Sequence[int]) -> LogitsFn:
    """`logits_fn` on weights that are made ready once, outside of any loop.

    Args:
      model, variables, image_shape: as of `prepare`.
    """
    return logits_fn(model, prepare(model, variables, image_shape))


def logits_fn(model: nn.Module, variables: Any) -> LogitsFn:
    """The network in evaluation mode: images [B, H, W, C] -> logits [B, K].

    Normalisation layers use the running statistics in `variables`. The function is a
    pytree of them: where a compiled function takes it, they are arguments.
    """
    return jax.tree_util.Partial(model.apply, variables)


def one_pass(
    model: nn.Module, variables: Any, batches: Sequence[jax.Array], *, frozen: bool
) -> tuple[list[jax.Array], Any]:
    """Logits of several batches in one forward pass.

    Interleaving keeps each image on its device; concatenating would move them all.

    In evaluation mode (`frozen`) every image is on its own; else the batch statistics
    are those of all batches [B, H, W, C] together, and the running ones move. Returns
    logits [B, K] of each batch, and the running statistics after it.
    """
    stacked = jnp.stack(batches, axis=1)
    images = stacked.reshape(-1, *stacked.shape[2:])
    batch_stats = variables["batch_stats"]
    if frozen:
        logits = logits_fn(model, variables)(images)
    else:
        logits, updated = model.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        batch_stats = updated.get("batch_stats", {})
    logits = logits.reshape(*stacked.shape[:2], -1)
    return [logits[:, i] for i in range(len(batches))], batch_stats
