"""Finished pieces of an evaluation on disk, so that a stopped one goes on.

A unit is a small dictionary of arrays in one `.npz`, written under another name and
renamed: it is there whole or not at all. Units lie in a folder named by what decides
their content (weights, data, settings); another protocol never meets them.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from atebm_jax import sharding, storage
from atebm_jax.errors import UserError

Arrays = dict[str, np.ndarray]


def fingerprint(description: Any) -> str:
    """Twelve hex digits of the SHA-256 of a JSON value."""
    text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Store:
    """Units of one protocol in one folder.

    Args:
      folder: made when the first unit is saved; None keeps nothing.
      settings: plain JSON that decides what the units hold.
      flag: that gives another folder, for messages.
    """

    def __init__(
        self,
        folder: epath.Path | None,
        settings: Mapping[str, Any],
        flag: str = "--out",
    ):
        self._settings = dict(settings)
        self._base = folder
        self._flag = flag
        self._folder = folder and folder / fingerprint(self._settings)

    def within(self, **settings: Any) -> "Store":
        """The store of a part, with settings of its own beside these."""
        return Store(self._base, self._settings | settings, self._flag)

    def load(self, name: str) -> Arrays | None:
        """A unit, or None if it is absent or damaged (it is then made anew).

        The first process reads it and tells the others, whose disks need not have it:
        all go on with the same.
        """
        if self._folder is None:
            return None
        path = self._folder / f"{name}.npz"
        arrays = _read(path) if jax.process_index() == 0 else None
        return sharding.from_first_process(arrays)

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a unit, whole or not at all; only the first process does.

        Raises:
          UserError: the folder cannot be written.
        """
        if jax.process_index() != 0 or self._folder is None:
            return
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
            storage.write_npz(self._folder / f"{name}.npz", arrays)

    def check_writable(self) -> None:
        """Looks whether a unit could be written, before the work that makes it.

        Every process must call it.

        Raises:
          UserError: the folder cannot be made, or no file in it.
        """
        refusal = ""
        if jax.process_index() == 0 and self._folder is not None:
            try:
                with self._writing():
                    self._folder.mkdir(parents=True, exist_ok=True)
                    storage.probe(self._folder / "unit.npz", shared=True)
            except UserError as error:
                refusal = str(error)
        refusal = sharding.first_said(refusal)
        if refusal:
            raise UserError(refusal)

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        remedy = f"Make room or give another {self._flag}; what is finished is kept."
        return storage.writing(str(self._folder), remedy)


def _read(path: epath.Path) -> Arrays | None:
    try:
        return storage.read_npz(path) if path.exists() else None
    except OSError:
        return None
