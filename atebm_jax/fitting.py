"""Refuses loaded weights that do not fit the network."""

from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

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


# What, beside the weights, determines the function of a network.
_FUNCTION: tuple[str, ...] = ("mean", "std", "standardize", "activation")
_FUNCTION += ("shortcut", "patch", "norm_epsilon")


def check_function(
    expected: ml_collections.ConfigDict, stored: Mapping[str, Any], source: str
) -> None:
    """Refuses weights that were trained for another function of the same shapes.

    Args:
      expected: `config.model` to use them with.
      stored: `config.model` that they were trained with, as plain JSON.
      source: where they came from, for the message.

    Raises:
      UserError: names the field, both values and the flag to give.
    """
    for field in _FUNCTION:
        want, have = expected[field], stored.get(field, expected[field])
        if field in ("mean", "std"):
            want, have = tuple(want), tuple(have)
            same = len(want) == len(have) and np.allclose(want, have, rtol=0, atol=1e-5)
        else:
            same = want == have
        if not same:
            raise UserError(
                f"config.model.{field} is {want!r} and the weights of {source} were "
                f"trained with {have!r}: give --config.model.{field}={have!r}."
            )


def _shapes(tree: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): str(tuple(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
