"""Finds the networks in a saved tree, and averaged weights that cannot be used."""

import re
from collections.abc import Collection
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

_SAVE = "save the weights alone: torch.save(model.state_dict(), 'weights.pt')"

# No training state has more entries. A file can hold one mapping many times.
_MOST_ENTRIES = 1_000_000


def collect(source: Source) -> dict[str, dict[str, Any]]:
    """The innermost mappings that hold a matrix or a kernel, by dotted name.

    Raises:
      UserError: there are none, or more entries than any training state has.
    """
    left = _MOST_ENTRIES

    def within(tree: Any, parts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        nonlocal left
        found: dict[str, dict[str, Any]] = {}
        if not isinstance(tree, dict) or len(parts) == _DEEPEST_NETWORK:
            return found
        left -= len(tree)
        if left < 0:
            raise refusal(
                f"{source.path} is refused: it holds more than {_MOST_ENTRIES:,} "
                f"entries; {_SAVE}."
            )
        own = {key: value for key, value in tree.items() if isinstance(key, str)}
        for key, value in own.items():
            if not key.lower().startswith(_OTHERS):
                found |= within(value, (*parts, key))
        if not found and any(map(_is_matrix, own.values())):
            found[".".join(parts)] = own
        return found

    networks = within(source.tree, ())
    if not networks:
        raise _without_weights(source)
    return networks


def _is_matrix(value: Any) -> bool:
    return is_array(value) and len(value.shape) >= 2


def _without_weights(source: Source) -> UserError:
    tree = source.tree
    places = {"the file": tree} | (tree if isinstance(tree, dict) else {})
    for place, value in places.items():
        if isinstance(value, Inert):
            return refusal(
                f"{source.path} has no weights by name: {place!r} is a whole object of "
                f"class {value.kind}, which is never rebuilt; {_SAVE}."
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
    seen: set[int] = set()

    def search(value: Any, parts: tuple[str, ...], average: str | None) -> None:
        if id(value) in seen or len(parts) > _DEEPEST_AVERAGE:
            return
        seen.add(id(value))
        name, key = ".".join(parts), parts[-1] if parts else ""
        usable = any(f"{network}.".startswith(f"{name}.") for network in networks)
        # Averages of gradients and of losses are no weights.
        other = key.startswith("exp_avg") or "grad" in key or "loss" in key
        if average is None and is_averaged(key) and not usable and not other:
            average = name
        held = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        items = held.items() if isinstance(held, dict) else ()
        children = {str(k): x for k, x in items if isinstance(k, str | int)}
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
                search(inner, (*parts, key), average)

    search(source.tree, (), None)
    return list(found.values())


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
