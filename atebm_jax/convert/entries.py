"""Finds the networks in a saved tree, and averaged weights that cannot be used."""

import re
from collections.abc import Collection, Iterator
from typing import Any

from atebm_jax.convert.files import Source, is_array, refusal
from atebm_jax.convert.values import Inert
from atebm_jax.errors import UserError

# Words of a name that say that the weights under it are averaged.
_AVERAGED = frozenset({"ema", "swa", "avg", "averaged", "average", "shadow", "polyak"})

# Entries of training states that hold arrays but no network.
_OTHERS = ("optim", "sched", "scaler", "amp", "grad", "loss")

# How deep in the tree networks and unusable averages are searched for.
_DEEPEST_NETWORK = 3
_DEEPEST_AVERAGE = 8

# How a user can make such averages usable.
COPY = (
    "copy them into the network in PyTorch and save model.state_dict() to import them"
)

# No training state has more entries. A file can hold one mapping many times.
_MOST_ENTRIES = 1_000_000


def collect(source: Source) -> dict[str, dict[str, Any]]:
    """The innermost mappings that hold a matrix or a kernel, by dotted name.

    Raises:
      UserError: there are none, or more entries than any training state has.
    """
    try:
        found = _collect(source.tree, "", 0, iter(range(_MOST_ENTRIES)))
    except StopIteration as error:
        raise refusal(
            f"{source.path} is refused: it holds more than {_MOST_ENTRIES:,} entries; "
            "save the weights alone: torch.save(model.state_dict(), 'weights.pt')."
        ) from error
    if not found:
        raise _without_weights(source)
    return found


def _collect(
    tree: Any, name: str, depth: int, left: Iterator[int]
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if not isinstance(tree, dict) or depth == _DEEPEST_NETWORK:
        return found
    own = {}
    for key, value in tree.items():
        next(left)
        if isinstance(key, str):
            own[key] = value
            if not key.lower().startswith(_OTHERS):
                inner = f"{name}.{key}" if name else key
                found |= _collect(value, inner, depth + 1, left)
    if not found and any(map(_is_matrix, own.values())):
        found[name] = own
    return found


def _is_matrix(value: Any) -> bool:
    return is_array(value) and len(value.shape) >= 2


def _without_weights(source: Source) -> UserError:
    tree = source.tree
    places = {"the file": tree} | (tree if isinstance(tree, dict) else {})
    for place, value in places.items():
        if isinstance(value, Inert):
            return refusal(
                f"{source.path} has no weights by name: {place!r} is a whole object of "
                f"class {value.kind}, which is never rebuilt; save the weights alone "
                "with torch.save(model.state_dict(), 'weights.pt')."
            )
    keys = ", ".join(map(str, tree)) if isinstance(tree, dict) else type(tree).__name__
    beside = "".join(f"; {line}" for line in unusable_averages(source, ()))
    return refusal(
        f"{source.path} holds no weights: expected a state dict or a training state "
        f"with one, found {keys[:200] or 'nothing'}{beside}."
    )


def is_averaged(name: str) -> bool:
    """Whether a name says that the weights under it are averaged."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return bool(_AVERAGED & {word.lower() for word in words})


def unusable_averages(source: Source, networks: Collection[str]) -> list[str]:
    """A phrase for each average in the file without names, or as a whole object.

    Averages that contain one of `networks` (names, as of `collect`) can be used.
    """
    found: dict[str, str] = {}
    _find_averages(source.tree, (), None, networks, found, set())
    return list(found.values())


def _find_averages(
    value: Any,
    parts: tuple[str, ...],
    average: str | None,
    networks: Collection[str],
    found: dict[str, str],
    seen: set[int],
) -> None:
    """Adds unusable averages to `found`: at the name of `parts`, below `average`."""
    if id(value) in seen or len(parts) > _DEEPEST_AVERAGE:
        return
    seen.add(id(value))
    name = ".".join(parts)
    usable = any(f"{network}.".startswith(f"{name}.") for network in networks)
    if average is None and parts and not usable and _is_average(parts[-1]):
        average = name
    children = _children(value)
    what = None
    if isinstance(value, Inert):
        what = f"a whole object of class {value.kind}"
    elif any(map(_is_matrix, children.values())):
        named = any(not key.isdigit() for key in children)
        count = f"{len(children)} array{'s' * (len(children) != 1)}"
        what = f"{count} {'too deep in the file' if named else 'without names'}"
    if average is not None and what is not None:
        said = f"averages that cannot be used, under {name!r}, {what}: {COPY}"
        found.setdefault(average, said)
    for key, inner in children.items():
        if isinstance(inner, dict | list | tuple | Inert):
            _find_averages(inner, (*parts, key), average, networks, found, seen)


def _is_average(key: str) -> bool:
    # Averages of gradients and of losses are no weights.
    other = key.startswith("exp_avg") or "grad" in key or "loss" in key
    return is_averaged(key) and not other


def _children(tree: Any) -> dict[str, Any]:
    """The values of a mapping or list, by name or position."""
    if isinstance(tree, list | tuple):
        return {str(place): value for place, value in enumerate(tree)}
    if not isinstance(tree, dict):
        return {}
    return {str(k): value for k, value in tree.items() if isinstance(k, str | int)}


def split(entry: str | None, networks: Collection[str]) -> tuple[str | None, str]:
    """The network that `--entry` means, and a prefix of names inside it.

    Raises:
      UserError: there is none of that name.
    """
    if entry is None or entry in networks:
        return entry, ""
    for name in sorted(networks, key=len, reverse=True):
        if name and entry.startswith(f"{name}."):
            return name, entry.removeprefix(f"{name}.")
    if len(networks) == 1:
        return None, entry
    raise refusal(f"--entry={entry} is not in the file: {listing(networks)}.")


def listing(networks: Collection[str]) -> str:
    """The names of networks, for a message."""
    names = [repr(name) if name else "no prefix" for name in networks]
    return f"it holds weights under {', '.join(names[:8])}"
