"""Matches every parameter of a file with every parameter of a network, by name."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax
import numpy as np

from atebm_jax.convert import names
from atebm_jax.convert.files import refusal
from atebm_jax.errors import UserError

# How many names a message lists.
_MOST_NAMED = 6


class Match(NamedTuple):
    """One array: PyTorch's name and shape, and the path of ours."""

    name: str
    shape: tuple[int, ...]
    path: str


def without_unused(
    family: str, arrays: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Drops arrays that published networks carry and never use, and says so.

    Only if all other names belong to the family: another network may use them.
    """
    shapes = {name: array.shape for name, array in arrays.items()}
    unused, what = names.known(family).unused(shapes)
    rest = {n: x for n, x in arrays.items() if n not in unused}
    if not unused or not all(_place(family, n, x)[0] for n, x in rest.items()):
        return dict(arrays), []
    return rest, [f"dropped {len(unused)} arrays {what}"]


def match(
    family: str,
    arrays: Mapping[str, np.ndarray],
    expected: Any,
    network: str,
    path: str,
) -> tuple[dict[str, Any], list[Match]]:
    """Gives every variable of a network its array.

    Args:
      family: a key of `models.FAMILIES`.
      arrays: by PyTorch name.
      expected: as of `models.variable_shapes`.
      network, path: of the network and the file, for messages.

    Returns:
      (variables of float32 arrays, the matches in the file's order).

    Raises:
      UserError: names what is left over, missing or of another shape.
    """
    expected = flax.traverse_util.flatten_dict(expected, sep="/")
    theirs = {
        p: names.one_to_torch(family, p, np.broadcast_to(np.False_, x.shape))
        for p, x in expected.items()
    }
    missing = {place: name for place, (name, _) in theirs.items()}
    flat: dict[str, np.ndarray] = {}
    matches, left_over, misshapen = [], [], []
    for name, array in arrays.items():
        place, value = _place(family, name, array)
        missing.pop(place, None)
        if place not in theirs or place in flat or array.dtype.kind != "f":
            left_over.append(name)
        elif value.shape != expected[place].shape:
            shape = theirs[place][1].shape
            misshapen.append(f"{name} {array.shape} instead of {shape}")
        else:
            flat[place] = value
            matches.append(Match(name, array.shape, place))
    problems = {
        "other shapes:": misshapen,
        "missing:": list(missing.values()),
        "left over:": left_over,
    }
    said = [f"{what} {_counted(found)}" for what, found in problems.items() if found]
    if said:
        raise refusal(f"{path} does not fit {network}: {'; '.join(said)}.")
    return flax.traverse_util.unflatten_dict(flat, sep="/"), matches


def _place(family: str, name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """`names.one_from_torch`, with the path "" for a name that the family lacks."""
    try:
        return names.one_from_torch(family, name, array)
    except UserError:
        return "", array


def _counted(found: list[str]) -> str:
    more = f", and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    return f"{len(found)} ({', '.join(found[:_MOST_NAMED])}{more})"
