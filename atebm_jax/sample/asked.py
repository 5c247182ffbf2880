"""What flags ask for: classes by number or name, and radii."""

import argparse
import logging
from collections.abc import Sequence

import ml_collections
import numpy as np

from atebm_jax import data
from atebm_jax.data import classes
from atebm_jax.errors import UserError
from atebm_jax.names import of_class
from atebm_jax.trained import Trained

_log = logging.getLogger(__name__)


def class_names(loaded: Trained, flags: argparse.Namespace) -> list[str]:
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


def _names_of_data(config: ml_collections.ConfigDict, data_dir: str) -> tuple[str, ...]:
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
