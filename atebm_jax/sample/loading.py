"""A trained model for the commands, and its classes by number or name."""

import argparse
import importlib.metadata
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import ml_collections
import numpy as np

from atebm_jax import checkpoint, data, models
from atebm_jax import config as configuration
from atebm_jax.data import classes
from atebm_jax.errors import UserError
from atebm_jax.evaluate.store import weights_fingerprint
from atebm_jax.names import of_class
from atebm_jax.seeds import Gaussian, from_arrays

_log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A trained model.

    Attributes:
      model: images to logits.
      variables: its averaged weights.
      config: complete.
      image_shape: (H, W, C).
      num_classes: K.
      described: for protocols.
      gaussian: what seeds of training were drawn from; None where they were not.
      class_names: K names, or None where the checkpoint has none.
    """

    model: nn.Module
    variables: Any
    config: Any
    image_shape: tuple[int, int, int]
    num_classes: int
    described: dict[str, Any]
    gaussian: Gaussian | None = None
    class_names: tuple[str, ...] | None = None


def load(flags: argparse.Namespace) -> Loaded:
    """Loads --workdir.

    Raises:
      UserError: nothing is there, or it cannot be read.
    """
    weights, meta = checkpoint.load_weights(flags.workdir, best_by=flags.best_by)
    config = ml_collections.ConfigDict(configuration.complete(meta["config"]))
    described = {
        "checkpoint": str(flags.workdir),
        "averaged_weights_sha256": weights_fingerprint(weights),
        "versions": {n: importlib.metadata.version(n) for n in ("atebm_jax", "jax")},
    }
    shape = tuple(config.data.image_shape)
    return Loaded(
        models.build(config.model),
        weights,
        config,
        shape,
        config.model.num_classes,
        described,
        from_arrays(meta["seeds"], shape) if "seeds" in meta else None,
        checkpoint.class_names(meta),
    )


def class_names(loaded: Loaded, flags: argparse.Namespace) -> list[str]:
    """K names: those of the checkpoint, or numbers where it has none.

    With --classes_by_place such a checkpoint takes them from the config's test images,
    where these are here.
    """
    number = loaded.num_classes
    if loaded.class_names is not None:
        return list(loaded.class_names)
    if flags.classes_by_place:
        found = _names_of_data(loaded.config, flags.data_dir)
        if len(found) == number:
            return list(found)
    _log.warning(
        "the checkpoint does not name its classes: they go by their numbers, 0 to %d",
        number - 1,
    )
    return [str(k) for k in range(number)]


def _names_of_data(config: Any, data_dir: str) -> tuple[str, ...]:
    try:
        source = data.open_source(config.data.test, data_dir or config.data.data_dir)
    except (UserError, ImportError):
        return ()
    return source.class_names or ()


def parse_classes(flag: str, text: str, names: Sequence[str]) -> np.ndarray:
    """[M] int32 of "3,7", of names, or of "all"; one name may have commas itself.

    Raises:
      UserError: no such class, or more than one, as of `classes.find`.
    """
    if text == "all":
        classes.check_keyword(flag, text, names)
        return np.arange(len(names), dtype=np.int32)
    words = (
        [text]
        if of_class(text) in names
        else [part.strip() for part in text.split(",")]
    )
    return np.asarray([classes.find(flag, word, names) for word in words], np.int32)


def named(k: int, names: Sequence[str]) -> dict[str, Any]:
    """A class for JSON."""
    return {"class": int(k), "name": names[k]}


def parse_radii(text: str) -> list[float]:
    """Positive numbers with commas.

    Raises:
      UserError: anything else.
    """
    try:
        # Those that would have one name are one.
        radii = list(
            {f"{(r := float(word)):g}": r for word in text.split(",")}.values()
        )
    except ValueError:
        radii = []
    if not radii or not all(0 < radius < np.inf for radius in radii):
        raise UserError(
            f"--radius={text}: expected positive numbers with commas, such as 1,2,4."
        )
    return radii
