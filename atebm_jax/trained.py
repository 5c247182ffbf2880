"""A trained model from disk: network, weights, config, classes, fingerprint."""

import hashlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from etils import epath

from atebm_jax import checkpoint, models
from atebm_jax import config as configuration
from atebm_jax.seeds import Gaussian, from_arrays


class Trained(NamedTuple):
    """A trained model."""

    model: nn.Module  #: images to logits
    variables: Any  #: its averaged weights, float32, on the host
    config: ml_collections.ConfigDict  #: the complete config that it was trained with
    meta: dict[str, Any]  #: of the checkpoint: "stage", "step", "T" and more
    #: what its seeds were drawn from; None where they were not
    gaussian: Gaussian | None = None
    #: K names; None where the checkpoint has none
    class_names: tuple[str, ...] | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return tuple(self.config.data.image_shape)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.config.model.num_classes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights."""
        return fingerprint(self.variables)


def load(path: str | epath.Path, *, best_by: str | None = None) -> Trained:
    """Loads a trained model.

    Args:
      path, best_by: as of `checkpoint.load_weights`.

    Raises:
      UserError: nothing is there, or it cannot be read.
    """
    weights, meta = checkpoint.load_weights(path, best_by=best_by)
    config = ml_collections.ConfigDict(configuration.complete(meta["config"]))
    shape = tuple(config.data.image_shape)
    return Trained(
        model=models.build(config.model),
        variables=weights,
        config=config,
        meta=meta,
        gaussian=from_arrays(meta["seeds"], shape) if "seeds" in meta else None,
        class_names=checkpoint.class_names(meta),
    )


def fingerprint(weights: Any) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of every array of a pytree."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        array = np.ascontiguousarray(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
