"""What flags ask for: classes by number or name, and how images are drawn."""

import argparse
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from atebm_jax import data
from atebm_jax.data import classes
from atebm_jax.errors import UserError
from atebm_jax.names import of_class
from atebm_jax.recipes import Recipe
from atebm_jax.trained import Trained

_log = logging.getLogger(__name__)


def class_names(loaded: Trained, flags: argparse.Namespace) -> list[str]:
    """K names: those of the checkpoint, or numbers where it has none.

    With --classes_by_place, a checkpoint without names takes those of the config's test
    images if these are here.
    """
    names, config = loaded.class_names, loaded.config.data
    if names is None and flags.classes_by_place:
        with contextlib.suppress(UserError, ImportError):
            source = data.open_source(config.test, flags.data_dir or config.data_dir)
            names = source.class_names
    if names is None or len(names) != loaded.num_classes:
        _log.warning(
            "the checkpoint does not name its classes: they go by their numbers, 0 to "
            "%d",
            loaded.num_classes - 1,
        )
    return classes.names_of(names, loaded.num_classes)


def parse_classes(flag: str, text: str, names: Sequence[str]) -> np.ndarray:
    """[M] int32 of "3,7", of names, or of "all"; one name may have commas itself.

    Raises:
      UserError: no such class, or more than one, as of `classes.find`.
    """
    if text == "all":
        classes.check_keyword(flag, text, names)
        return np.arange(len(names), dtype=np.int32)
    alone = of_class(text) in names
    words = [text] if alone else [part.strip() for part in text.split(",")]
    return np.asarray([classes.find(flag, word, names) for word in words], np.int32)


def of_recipe(flags: argparse.Namespace) -> dict[str, Any]:
    """The flags that are fields of a recipe under the same name."""
    return {k: value for k, value in vars(flags).items() if k in Recipe._fields}
