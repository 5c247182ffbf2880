"""Refuses loaded weights that do not fit the network."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from atebm_jax import models
from atebm_jax.errors import UserError


def check_weights(expected: Any, weights: Any, source: str) -> None:
    """Refuses weights with other names or shapes than a network has.

    Args:
      expected: a network's variables (arrays or shapes).
      weights: the loaded ones.
      source: where they came from, for the message.

    Raises:
      UserError: names the first parameters that are missing, left over or of another
        shape.
    """
    want, have = _shapes(expected), _shapes(weights)
    differences = [
        f"{name} {have.get(name, 'missing')} instead of {want.get(name, 'nothing')}"
        for name in sorted(want.keys() | have.keys())
        if want.get(name) != have.get(name)
    ]
    if differences:
        raise UserError(
            f"the weights of {source} do not fit config.model, {len(differences)} "
            f"arrays differ: {'; '.join(differences[:3])}. Give config.model the "
            "values they were trained with."
        )


def check_function(
    expected: Mapping[str, Any], stored: Mapping[str, Any], source: str
) -> None:
    """Refuses weights that were trained for another function of the same shapes.

    Beside its weights, the class and the attributes of a network decide its function:
    two configs have one function where these are equal, whatever their families.

    Args:
      expected: `config.model` to use them with.
      stored: `config.model` that they were trained with, complete.
      source: where they came from, for the message.

    Raises:
      UserError: names the field, both values and the flag to give.
    """
    want = _plain(expected)
    # Of a field that is newer than the weights nothing can be said.
    have = want | _plain(stored)
    changed = _differences(want, have)
    decisive = _differences(_attributes(want), _attributes(have)) if changed else []
    if not decisive:
        return
    # What is no field follows from the family or, within one, from other fields.
    known = have["name"] in models.FAMILIES
    named = (*decisive, "name", *changed) if known else ("name",)
    field = next(f for f in named if f in changed)
    raise UserError(
        f"config.model.{field} is {want[field]!r} and the weights of {source} were "
        f"trained with {have[field]!r}: give --config.model.{field}={have[field]!r}."
    )


def _plain(model: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.model` with tuples also where JSON made lists of them."""
    return {n: tuple(x) if isinstance(x, list) else x for n, x in model.items()}


def _attributes(model: Mapping[str, Any]) -> dict[str, Any]:
    """A network's attributes, its class as "name"; {} of a family not known here."""
    if model["name"] not in models.FAMILIES:
        return {}
    network = models.build(ml_collections.ConfigDict(model))
    made = {f.name: getattr(network, f.name) for f in dataclasses.fields(network)}
    return made | {"name": type(network)}


# Memory and rounding, not the function; and what Flax keeps in a network.
_NO_FUNCTION = ("dtype", "remat", "parent")


def _differences(want: Mapping[str, Any], have: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name, value in want.items()
        if name not in _NO_FUNCTION and not _same(name, value, have.get(name))
    ]


def _same(name: str, want: Any, have: Any) -> bool:
    if np.shape(want) != np.shape(have):
        return False
    if name in ("mean", "std"):
        return np.allclose(want, have, rtol=0, atol=1e-5)
    # An attribute of a user's network may be an array.
    return bool(np.all(want == have))


def _shapes(tree: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): str(tuple(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
