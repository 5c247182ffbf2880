"""Under which licence weights are given away."""

import importlib.metadata
import re
from pathlib import Path
from typing import NamedTuple

from atebm_jax.checkpoint import IMPORTED
from atebm_jax.errors import UserError
from atebm_jax.storage import reached
from atebm_jax.trained import Trained


class Licence(NamedTuple):
    """name: as model hubs abbreviate it, "apache-2.0"; text: of the file LICENSE."""

    name: str
    text: str


def choose(
    name: str | None, file: str | None, loaded: Trained, usual: str, *, released: bool
) -> Licence:
    """The licence of a release, as the flags --license and --license_file have it.

    Args:
      name, file: the flags; None where they were not given.
      loaded: the model; weights that were imported are under their owner's licence.
      usual: this package's own licence.
      released: the model was read from a release, which has a licence already.

    Raises:
      UserError: nobody says which licence, or nobody gives its text.
    """
    if name is None:
        if released or loaded.meta["stage"] == IMPORTED:
            origin = (
                "come from a release, and their licence is the one it has"
                if released
                else "were imported, and their licence is their owner's"
            )
            raise UserError(
                f"these weights {origin}: give --license=NAME and, unless that is "
                f"{usual}, --license_file=FILE."
            )
        name = usual
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        raise UserError(
            f"--license={name} is no abbreviation of a licence: expected one such as "
            f"{usual} or cc-by-4.0."
        )
    if file is not None:
        try:
            return Licence(name, reached(file).read_bytes().decode())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--license_file={file} cannot be read: {error}."
            ) from error
    if name.lower() != usual:
        raise UserError(f"--license={name} needs its text: give --license_file=FILE.")
    return Licence(usual, _of_this_package())


def _of_this_package() -> str:
    distribution = importlib.metadata.distribution("atebm_jax")
    text = distribution.read_text("licenses/LICENSE")
    # A clone that is on the path and not installed.
    return text or Path(__file__).parents[2].joinpath("LICENSE").read_text()
