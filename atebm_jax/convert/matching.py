"""Every parameter of a file against every parameter of a network, by name."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax
import numpy as np

from atebm_jax.convert import names
from atebm_jax.convert.files import printable
from atebm_jax.errors import UserError

# More names than this help nobody.
_MOST_NAMED = 6


class Match(NamedTuple):
    """One array: PyTorch's name and shape, and the path of ours."""

    name: str
    shape: tuple[int, ...]
    path: str


def without_unused(
    family: str, arrays: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Drops what a published network carries and never computes with.

    Only where every other name is the family's: in another network it may be in use.

    Args:
      family: a key of `models.FAMILIES`.
      arrays: by PyTorch name.

    Returns:
      (the arrays without them, a phrase for what was dropped).
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
      network: what the network is called in messages.
      path: the file, for messages.

    Returns:
      ({"params": ..., perhaps "batch_stats": ...} of float32 arrays, the matches in
      the file's order).

    Raises:
      UserError: names what is left over, missing or of another shape.
    """
    wanted = {
        p: tuple(x.shape)
        for p, x in flax.traverse_util.flatten_dict(expected, sep="/").items()
    }
    flat: dict[str, np.ndarray] = {}
    matches, left_over, misshapen = [], [], []
    for name, array in arrays.items():
        place, value = _place(family, name, array)
        if place not in wanted or place in flat or array.dtype.kind != "f":
            left_over.append(name)
        elif value.shape != wanted[place]:
            _, theirs = _torch_side(family, place, wanted[place])
            misshapen.append(f"{name} {array.shape} instead of {theirs}")
        else:
            flat[place] = value
            matches.append(Match(name, array.shape, place))
    seen = {_place(family, n, a)[0] for n, a in arrays.items()}
    missing = [_torch_side(family, p, wanted[p])[0] for p in wanted if p not in seen]
    problems = [
        f"{what} {len(found)} ({_some(found)})"
        for what, found in (
            ("other shapes:", misshapen),
            ("missing:", missing),
            ("left over:", left_over),
        )
        if found
    ]
    if problems:
        raise UserError(
            printable(f"{path} does not fit {network}: {'; '.join(problems)}.")
        )
    return flax.traverse_util.unflatten_dict(flat, sep="/"), matches


def _place(family: str, name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    try:
        return names.one_from_torch(family, name, array)
    except UserError:
        return "", array


def _torch_side(
    family: str, path: str, shape: tuple[int, ...]
) -> tuple[str, tuple[int, ...]]:
    """PyTorch's name and shape of a variable."""
    name, array = names.one_to_torch(family, path, np.broadcast_to(np.False_, shape))
    return name, array.shape


def _some(found: list[str]) -> str:
    more = f", and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    return ", ".join(found[:_MOST_NAMED]) + more
