"""What PyTorch calls a network's arrays: whose names they are, to ours and back.

The names of a family are in its own file (`models.family.TorchNames`).
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax
import numpy as np

from atebm_jax.errors import UserError
from atebm_jax.models import FAMILIES
from atebm_jax.models.family import Rules, Shapes, TorchNames

# Arrays of layers, by the last part of PyTorch's name and their number of axes: our
# collection and name, and where our axes are in theirs.
_LAYOUTS: dict[tuple[str, int], tuple[str, str, tuple[int, ...]]] = {
    ("weight", 4): ("params", "kernel", (2, 3, 1, 0)),
    ("weight", 2): ("params", "kernel", (1, 0)),
    ("weight", 1): ("params", "scale", (0,)),
    ("bias", 1): ("params", "bias", (0,)),
    ("running_mean", 1): ("batch_stats", "mean", (0,)),
    ("running_var", 1): ("batch_stats", "var", (0,)),
    ("threshold", 0): ("batch_stats", "threshold", ()),
}
_LAYOUTS_BACK = {
    (collection, ours, len(axes)): (theirs, tuple(map(int, np.argsort(axes))))
    for (theirs, _), (collection, ours, axes) in _LAYOUTS.items()
}


def known(family: str) -> TorchNames:
    """The names in PyTorch of a family of `models.FAMILIES`.

    Raises:
      UserError: it has none.
    """
    names = FAMILIES[family].torch
    if names is None:
        raise UserError(
            f"a {family} has no names in PyTorch: expected 'torch' in its entry of "
            "models.FAMILIES, as docs/own_network.md says."
        )
    return names


def families() -> Iterator[tuple[str, TorchNames, set[str]]]:
    """Each family with names in PyTorch, and the names of its mark in all sources."""
    for name, family in FAMILIES.items():
        if (torch := family.torch) is not None:
            inverse = _inverse(torch.aliases)
            others = (_rename((rule,), torch.mark) for rule in inverse)
            yield name, torch, {torch.mark, *(other for other in others if other)}


def recognise(shapes: Shapes) -> tuple[str | None, str | None]:
    """(family of a state dict, None), or (None, what other network it is).

    Both are None for unknown names.
    """
    others = {family: look_alike(family, shapes) for family, _, _ in families()}
    for family, _, marks in families():
        if not marks.isdisjoint(shapes) and not others[family]:
            return family, None
    return None, next(filter(None, others.values()), None)


def settled(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a file under names that translate one by one (`settle`)."""
    family = family_of(arrays)
    return known(family).settle(arrays) if family else dict(arrays)


def family_of(names: Iterable[str]) -> str | None:
    """The first family whose mark is among the names, which may be a look-alike's."""
    listed = set(names)
    return next((family for family, _, marks in families() if marks & listed), None)


def look_alike(family: str, shapes: Shapes) -> str | None:
    """What other network has the names of a family, or None if it is the family's."""
    for what, test in known(family).look_alikes.items():
        other = f"{what}, which is not built here"
        if callable(test):
            if test(shapes):
                return other
            continue
        for name, shape in shapes.items():
            if re.fullmatch(rf"(?:.*\.)?(?:{test})", name):
                return f"{other} (it has {name} {tuple(shape)})"
    return None


def looks_like_network(names: Iterable[str]) -> bool:
    """Whether a whole network of some family is among names, under any prefix.

    Its first layer must be there too, as a stage of a hierarchical transformer (Swin)
    has the names of a ViT.
    """
    listed = list(names)
    for family, torch, marks in families():
        for mark in marks:
            ends = [n for n in listed if n == mark or n.endswith(f".{mark}")]
            for prefix in {n.removesuffix(mark) for n in ends}:
                inner = (n.removeprefix(prefix) for n in listed if n.startswith(prefix))
                if any(_canonical(family, name) in torch.first for name in inner):
                    return True
    return False


def nearest(shapes: Shapes) -> str | None:
    """The family that has most of the names, or None if none has any.

    Of two that have as many, the one with fewer names of its own is nearer.
    """
    arrays = like(shapes)
    shared = {
        family: sum(_placed(family, n, x) is not None for n, x in arrays.items())
        for family, _, _ in families()
    }
    if not any(shared.values()):
        return None
    return max(shared, key=lambda name: (shared[name], -len(known(name).rules)))


def fields(family: str, shapes: Shapes) -> dict[str, Any]:
    """What the shapes say about `config.model`; what they leave open is left out."""
    torch, own = known(family), _own_names(family, shapes)
    found: dict[str, Any] = {"name": family}
    if torch.mark in own:
        found |= torch.fields(own)
    head = own.get(f"{_rename(_inverse(torch.rules), 'fc')}.weight", ())
    if len(head) == 2 and head[0]:
        found["num_classes"] = head[0]
    return found


def channels(family: str, shapes: Shapes) -> int:
    """Channels of the images: inputs of the first convolution, or 3."""
    own = _own_names(family, shapes)
    first = (own.get(name, ()) for name in known(family).first)
    return next((kernel[1] for kernel in first if len(kernel) == 4), 3)


def _own_names(family: str, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes by the family's own names, whatever the source calls the arrays."""
    return {_canonical(family, name): tuple(shape) for name, shape in shapes.items()}


def from_torch(family: str, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Turns a PyTorch state dict into Flax variables.

    Args:
      family: a key of `atebm_jax.models.FAMILIES`.
      state_dict: arrays by PyTorch name, without any wrapper's prefix; convolutions
        OIHW, linear layers [out, in]. `num_batches_tracked` is passed over, and what
        no forward pass of the family uses.

    Returns:
      {"params": ...} and, with batch normalisation, "batch_stats"; convolutions HWIO,
      dense layers [in, out]. The arrays keep their dtypes.

    Raises:
      UserError: a name that the family does not have, or one parameter twice.
    """
    flat: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    settled = known(family).settle(state_dict)
    unused, _ = known(family).unused({n: np.shape(x) for n, x in settled.items()})
    for name, array in settled.items():
        if name.rpartition(".")[2] == "num_batches_tracked" or name in unused:
            continue
        array = np.asarray(array)
        placed = _placed(family, name, array)
        if placed is None:
            rules = known(family).rules
            example = re.sub(r"{\w+}", "0", rules[-2][0])
            raise UserError(
                f"{name!r} with shape {array.shape} is no parameter of a {family}: "
                f"expected names such as '{example}.weight' or '{rules[-1][0]}.bias'."
            )
        path, value = placed
        if path in flat:
            raise UserError(
                f"{name!r} and {origin[path]!r} are the same parameter of a {family}: "
                "expected one state dict, with one naming."
            )
        flat[path], origin[path] = value, name
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def to_torch(family: str, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Turns Flax variables into a PyTorch state dict: the inverse of `from_torch`.

    Args:
      family: a key of `atebm_jax.models.FAMILIES`.
      variables: {"params": ...} and, where the family has it, "batch_stats".

    Returns:
      Contiguous arrays by the family's own names. `num_batches_tracked` is left out:
      PyTorch's strict loading of a plain dict does without.

    Raises:
      UserError: a variable that the family does not have.
    """
    flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
    made = (one_to_torch(family, path, np.asarray(x)) for path, x in flat.items())
    return {name: np.asarray(value, order="C") for name, value in made}


def begins_network(part: str) -> bool:
    """Whether the first part of a name belongs to a network and not to a wrapper."""
    return any(
        re.fullmatch(_pattern(theirs.partition(".")[0]), part)
        for _, torch, _ in families()
        for theirs, _ in (*torch.rules, *torch.aliases)
    )


def _canonical(family: str, name: str) -> str:
    """The family's own name for what another source calls `name`."""
    return _rename(known(family).aliases, name) or name


def _placed(family: str, name: str, array: np.ndarray) -> tuple[str, np.ndarray] | None:
    """The path of an array in the variables, and its layout there; None without one."""
    torch = known(family)
    module, _, leaf = _canonical(family, name).rpartition(".")
    path = _rename(torch.rules, module)
    if path is not None and leaf in torch.bare:
        axes = torch.bare[leaf]
        trailing = set(array.shape[axes:]) <= {1}
        value = array.reshape(array.shape[:axes]) if trailing else array
        return "/".join(part for part in ("params", path, leaf) if part), value
    if path and (leaf, array.ndim) in _LAYOUTS:
        collection, ours, layout = _LAYOUTS[leaf, array.ndim]
        return f"{collection}/{path}/{ours}", array.transpose(layout)
    return None


def one_to_torch(family: str, path: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """One array of `to_torch`: its PyTorch name, and its layout there (a view)."""
    torch = known(family)
    collection, _, rest = path.partition("/")
    module, _, leaf = rest.rpartition("/")
    name = _rename(_inverse(torch.rules), module)
    if collection == "params" and name is not None and leaf in torch.bare:
        return (f"{name}.{leaf}" if name else leaf), array
    if name and (collection, leaf, array.ndim) in _LAYOUTS_BACK:
        theirs, layout = _LAYOUTS_BACK[collection, leaf, array.ndim]
        return f"{name}.{theirs}", array.transpose(layout)
    raise UserError(
        f"{path!r} with shape {array.shape} is no variable of a {family}: expected "
        f"names such as 'params/{torch.rules[-1][1]}/kernel'."
    )


def like(shapes: Shapes) -> dict[str, np.ndarray]:
    """Arrays of these shapes that take no memory."""
    return {name: np.broadcast_to(np.float32(0), x) for name, x in shapes.items()}


class Match(NamedTuple):
    """One array: PyTorch's name and shape, and the path of ours."""

    name: str
    shape: tuple[int, ...]
    path: str


class Comparison(NamedTuple):
    """The arrays of a file beside those of a network."""

    variables: dict[str, Any]  # of the arrays that fit
    matches: list[Match]  # the arrays that fit, in the file's order
    differences: str  # of each kind, the number and the first; "" if all fit


def without_unused(
    family: str, arrays: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Drops arrays that published networks carry and never use, and says so.

    Only if all other names belong to the family: another network may use them.
    """
    shapes = {name: array.shape for name, array in arrays.items()}
    unused, what = known(family).unused(shapes)
    rest = {n: x for n, x in arrays.items() if n not in unused}
    if not unused or not all(_placed(family, n, x) for n, x in rest.items()):
        return dict(arrays), []
    return rest, [f"dropped {len(unused)} arrays {what}"]


def compare(family: str, arrays: Mapping[str, np.ndarray], expected: Any) -> Comparison:
    """Gives every variable of a network its array, where there is one.

    Args:
      family: a key of `models.FAMILIES`.
      arrays: by PyTorch name.
      expected: shapes of the variables, as of `models.variable_shapes`.
    """
    expected = flax.traverse_util.flatten_dict(expected, sep="/")
    absent = {
        place: one_to_torch(family, place, array)
        for place, array in like({p: x.shape for p, x in expected.items()}).items()
    }
    flat: dict[str, np.ndarray] = {}
    matches, misshapen, left_over = [], [], []
    for name, array in arrays.items():
        place, value = _placed(family, name, array) or ("", array)
        _, theirs = absent.pop(place, ("", None))
        if theirs is None or array.dtype.kind != "f":
            left_over.append(f"{name} {array.shape}")
        elif value.shape != expected[place].shape:
            misshapen.append(f"{name} {array.shape} instead of {theirs.shape}")
        else:
            flat[place] = value
            matches.append(Match(name, array.shape, place))
    # Parameters first: that their statistics are missing too says no more.
    missing = sorted(absent, key=lambda place: place.startswith("batch_stats"))
    differences = {
        "other shapes": misshapen,
        "missing": [f"{absent[p][0]} {absent[p][1].shape}" for p in missing],
        "left over": left_over,
    }
    said = (
        f"{what}: {len(names)} ({names[0]}{', ...' * (len(names) > 1)})"
        for what, names in differences.items()
        if names
    )
    variables = flax.traverse_util.unflatten_dict(flat, sep="/")
    return Comparison(variables, matches, "; ".join(said))


def _rename(rules: Rules, name: str) -> str | None:
    """The name on the other side of the first rule that fits."""
    for before, after in rules:
        fits = re.fullmatch(_pattern(before), name)
        if fits:
            return after.format(**fits.groupdict())
    return None


def _inverse(rules: Rules) -> Rules:
    return tuple((ours, theirs) for theirs, ours in rules)


@functools.cache
def _pattern(template: str) -> str:
    escaped = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    escaped = escaped.replace("{leaf}", "(?P<leaf>weight|bias)")
    return re.sub(r"{(\w+)}", r"(?P<\1>\\d+)", escaped)
