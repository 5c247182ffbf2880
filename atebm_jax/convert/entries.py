"""What of a saved tree is weights: its entries, and which of them is meant."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from atebm_jax.convert.files import Source, is_array, printable, shape
from atebm_jax.convert.values import Inert
from atebm_jax.errors import UserError

# Usual names of the network in a training state, and of wrapping modules.
NETWORKS = frozenset(
    {
        *("state_dict", "model", "model_state_dict", "model_state", "net", "network"),
        *("base_model", "module", "weights", "params", "classifier"),
        *("online_model", "online"),
    }
)

# Names of networks beside another one, of which none is the usual one to take.
ROLES = frozenset({"student", "teacher", "target", "target_model", "momentum_encoder"})

# Words of such names that say that the weights are averaged.
_AVERAGED = frozenset({"ema", "swa", "avg", "averaged", "average", "shadow", "polyak"})

# Entries of training states that hold arrays but no network.
_OTHERS = ("optim", "sched", "scaler", "amp", "grad", "loss")

# What every network has one of, and copies of its parameters alone lack.
_KINDS = frozenset({"weight", "bias", "running_mean", "running_var"})

# How deep averages are looked for that nobody can use.
_DEEPEST = 6

# What makes averages without names usable.
_COPY = (
    "copy them into the network in PyTorch and save model.state_dict() to import them"
)


# More entries than any training state has: one mapping may hold another many times.
_MOST_ENTRIES = 1_000_000


def collect(source: Source, depth: int = 3) -> dict[str, dict]:
    """The innermost mappings that hold a matrix or a kernel, by dotted name.

    Raises:
      UserError: there are more entries than any training state has.
    """
    found: dict[str, dict] = {}
    try:
        _collect(source.tree, "", depth, found, iter(range(_MOST_ENTRIES)))
    except StopIteration as error:
        raise UserError(
            f"{source.path} is refused: it holds more than {_MOST_ENTRIES:,} entries; "
            "save the weights alone: torch.save(model.state_dict(), 'weights.pt')."
        ) from error
    return found


def _collect(
    tree: Any, name: str, depth: int, found: dict[str, dict], left: Iterator[int]
) -> None:
    if not isinstance(tree, dict) or depth == 0:
        return
    before = len(found)
    for key, value in tree.items():
        next(left)
        skipped = isinstance(key, str) and key.lower().startswith(_OTHERS)
        if isinstance(key, str) and not skipped:
            inner = f"{name}.{key}" if name else key
            _collect(value, inner, depth - 1, found, left)
    shapes = [shape(v) for k, v in tree.items() if isinstance(k, str) and is_array(v)]
    if len(found) == before and any(len(shape) >= 2 for shape in shapes):
        found[name] = {k: v for k, v in tree.items() if isinstance(k, str)}


def nothing(source: Source) -> str:
    """Why no weights were found."""
    tree = source.tree
    places = {"the file": tree} | (tree if isinstance(tree, dict) else {})
    for place, value in places.items():
        if isinstance(value, Inert):
            return printable(
                f"{source.path} has no weights by name: {place!r} is a whole object of "
                f"class {value.kind}, which is never rebuilt; save the weights alone "
                "with torch.save(model.state_dict(), 'weights.pt')."
            )
    keys = ", ".join(map(str, tree)) if isinstance(tree, dict) else type(tree).__name__
    beside = "".join(f"; {line}" for line in unusable_averages(source, {}))
    return printable(
        f"{source.path} holds no weights: expected a state dict or a training state "
        f"with one, found {keys[:200] or 'nothing'}{beside}."
    )


def is_averaged(name: str) -> bool:
    """Whether a name says that the weights under it are averaged."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return bool(_AVERAGED & {word.lower() for word in words})


def unusable_averages(source: Source, entries: Mapping[str, Any]) -> list[str]:
    """A phrase for each average of the file that has no names, or is a whole object.

    Args:
      source: an opened file.
      entries: as of `collect`, which can be used.
    """
    return list(map(printable, _averages(source.tree, "", _DEEPEST, entries, set())))


def _averages(
    tree: Any, name: str, depth: int, entries: Mapping[str, Any], seen: set[int]
) -> Iterator[str]:
    """Looks for them everywhere; no container is entered twice."""
    if depth == 0 or id(tree) in seen or (name and name in entries):
        return
    seen.add(id(tree))
    for key, value in _children(tree):
        inner = f"{name}.{key}" if name else key
        # Averages of gradients and of losses are no weights.
        other = key.startswith("exp_avg") or "grad" in key or "loss" in key
        usable = any(n == inner or n.startswith(f"{inner}.") for n in entries)
        held = None
        if is_averaged(key) and not other and not usable:
            held = _held(value, inner, _DEEPEST, set())
        if held is None:
            yield from _averages(value, inner, depth - 1, entries, seen)
        else:
            yield f"averages that cannot be used, under {held}: {_COPY}"


def _children(tree: Any) -> list[tuple[str, Any]]:
    """What a mapping or a list holds, by name or place."""
    if isinstance(tree, dict):
        return [(str(k), v) for k, v in tree.items() if isinstance(k, str | int)]
    if isinstance(tree, list | tuple):
        return [(str(place), value) for place, value in enumerate(tree)]
    return []


def _held(value: Any, name: str, depth: int, seen: set[int]) -> str | None:
    """Where arrays lie that are no network by name, and why; None where none do."""
    if isinstance(value, Inert):
        return f"{name!r}, a whole object of class {value.kind}"
    if depth == 0 or id(value) in seen:
        return None
    seen.add(id(value))
    children = _children(value)
    if any(is_array(v) and len(shape(v)) >= 2 for _, v in children):
        named = any(not key.isdigit() for key, _ in children)
        kind = "too deep in the file" if named else "without names"
        plural = "s" * (len(children) != 1)
        return f"{name!r}, {len(children)} array{plural} {kind}"
    inside = (_held(v, f"{name}.{k}", depth - 1, seen) for k, v in children)
    return next((found for found in inside if found), None)


def split(entry: str | None, entries: Mapping[str, Any]) -> tuple[str | None, str]:
    """An entry of the tree, and a prefix of names inside it."""
    if entry is None or entry in entries:
        return entry, ""
    for name in sorted(entries, key=len, reverse=True):
        if name and entry.startswith(f"{name}."):
            return name, entry.removeprefix(f"{name}.")
    if len(entries) == 1:
        return None, entry
    raise UserError(f"--entry={entry} is not in the file: {_listing(entries)}.")


def _listing(entries: Mapping[str, Any]) -> str:
    names = [repr(name) if name else "no prefix" for name in entries]
    return f"it holds weights under {', '.join(names[:8])}"


def choose(
    entries: Mapping[str, dict],
    name: str | None,
    path: str,
    steps: list[str],
    prefix: str = "",
) -> str:
    """Which mapping is meant; averaged weights that are whole go before others.

    Args:
      entries: networks by name; "" for names without a prefix.
      name: the one that was asked for.
      path: of the file, for messages.
      steps: what was chosen is added.
      prefix: what `--entry` has before a name.

    Raises:
      UserError: several, and none is the usual one.
    """
    averaged = [n for n in entries if is_averaged(n)]
    plain = [n for n in entries if n not in averaged]
    usual = [n for n in plain if _is_usual(n)]
    if name is None and len(entries) == 1:
        name = next(iter(entries))
    elif name is None and len(averaged) == 1 and len(plain) == len(usual) <= 1:
        name = averaged[0]
    elif name is None and len(usual) == 1 and not averaged:
        name = usual[0]
    elif name is None:
        named = [n for n in entries if n][:4]
        flags = " or ".join(f"--entry={prefix}{n}" for n in named)
        raise UserError(
            printable(
                f"{path} holds several networks: {_listing(entries)}; say which with "
                f"{flags}."
            )
        )
    others = [n for n in entries if n != name]
    if name or others:
        beside = ", ".join(_beside(n, prefix) for n in others[:4])
        kind = "averaged weights" if is_averaged(name) else "weights"
        where = f"under {name!r}" if name else "without a prefix"
        steps.append(
            f"took the {kind} {where}{f' (beside it: {beside})' * bool(beside)}"
        )
    return name


def _beside(name: str, prefix: str) -> str:
    """A network that is not taken, and how it is."""
    return (
        f"{name!r}, with --entry={prefix}{name}" if name else "names without a prefix"
    )


def _is_usual(name: str) -> bool:
    """Whether a network has no name of its own, or the usual one."""
    return not name or name.rpartition(".")[2] in NETWORKS


def whole(entries: Mapping[str, dict], steps: list[str]) -> dict[str, dict]:
    """The networks without averages that lack parts of the network beside them.

    Args:
      entries: networks by name.
      steps: what was left out, and why, is added.
    """
    plain = [n for n in entries if not is_averaged(n)]
    if len(plain) != 1 or not _is_usual(plain[0]):
        return dict(entries)
    kept = {}
    for name, names in entries.items():
        lacking = _lacking(names, entries[plain[0]]) if name != plain[0] else ""
        if lacking:
            what = f"under {name!r}: no {lacking} by name"
            steps.append(f"averages that cannot be used, {what}; {_COPY}")
        else:
            kept[name] = names
    return kept


def _lacking(averaged: Mapping[str, Any], network: Mapping[str, Any]) -> str:
    """Kinds of arrays that a network has by name and its averages have not."""
    there, here = (
        _KINDS & {name.rpartition(".")[2] for name in names}
        for names in (network, averaged)
    )
    return " and no ".join(sorted(there - here))
