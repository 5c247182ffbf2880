"""Finished pieces of an evaluation on disk, so that a stopped one goes on.

A unit is a small dictionary of arrays in one `.npz`, which is there whole or not at
all. Units lie in a folder named by what decides their content (weights, data,
settings), so that no other protocol reads them.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from atebm_jax import sharding, storage

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Store:
    """Units of one protocol in one folder."""

    #: of all protocols, made when the first unit is saved; None keeps nothing
    base: epath.Path | None
    settings: dict[str, Any]  #: plain JSON that decides what the units hold
    flag: str = "--out"  #: gives another folder, for messages

    @functools.cached_property
    def _folder(self) -> epath.Path | None:
        text = json.dumps(self.settings, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self.base and self.base / name

    def within(self, **settings: Any) -> "Store":
        """The store of a part, with settings of its own beside these."""
        return dataclasses.replace(self, settings=self.settings | settings)

    def load(self, name: str | int) -> Arrays | None:
        """A unit by name or number; None if it is absent or damaged: make it anew.

        The first process reads it and sends it to the others, whose disks need not
        have it.
        """
        if self._folder is None:
            return None
        arrays = None
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                arrays = storage.read_npz(self._folder / _file(name))
        return sharding.from_first_process(arrays)

    def units(self) -> Iterator[Arrays]:
        """Units 0, 1, ... up to the first one that is absent or damaged."""
        for number in itertools.count():
            unit = self.load(number)
            if unit is None:
                return
            yield unit

    def save(self, name: str | int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a unit, in the first process; a `UserError` if it cannot be."""
        if jax.process_index() != 0 or self._folder is None:
            return
        with self._writing():
            storage.write_npz(self._folder / _file(name), arrays)

    def check_writable(self) -> None:
        """Refuses with a `UserError` a folder that cannot be written, before the work.

        Every process must call it.
        """
        with sharding.refused_by_all():
            if jax.process_index() == 0 and self._folder is not None:
                with self._writing():
                    storage.probe(self._folder / "unit.npz", shared=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Makes the folder; a file that cannot be written is one clear sentence."""
        assert self._folder is not None
        remedy = f"Make room or give another {self.flag}; what is finished is kept."
        with storage.writing(str(self._folder), remedy):
            self._folder.mkdir(parents=True, exist_ok=True)
            yield


def _file(name: str | int) -> str:
    return f"{name:06d}.npz" if isinstance(name, int) else f"{name}.npz"
