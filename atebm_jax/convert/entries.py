"""What of a saved tree is weights: its entries, and which of them is meant."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from atebm_jax.convert.files import Source, is_array
from atebm_jax.convert.values import Inert
from atebm_jax.errors import UserError

# Usual names of the network in a training state, and of wrapping modules.
NETWORKS = frozenset(
    {
        *("state_dict", "model", "model_state_dict", "model_state", "net", "network"),
        *("base_model", "module", "weights", "params", "classifier"),
    }
)

# Parts of such names that say that the weights are averaged.
AVERAGED = frozenset({"ema", "swa", "avg", "averaged", "average"})

# Entries of training states that hold arrays but no network.
_OTHERS = ("optim", "sched", "scaler", "amp", "grad", "loss")


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


def shape(value: Any) -> tuple[int, ...]:
    """Shape of a leaf, read or not."""
    array = getattr(value, "array", value)
    return tuple(array.shape) if array is not None else ()


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
    return printable(
        f"{source.path} holds no weights: expected a state dict or a training state "
        f"with one, found {keys[:200] or 'nothing'}."
    )


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
    names = [repr(name) for name in entries]
    return f"it holds weights under {', '.join(names[:8])}"


def choose(
    entries: Mapping[str, dict], name: str | None, path: str, steps: list[str]
) -> dict:
    """The one mapping that is meant; averaged weights go before others."""
    averaged = [n for n in entries if AVERAGED & set(re.split(r"[._]", n.lower()))]
    plain = [n for n in entries if n not in averaged]
    usual = [n for n in plain if n.rpartition(".")[2] in NETWORKS]
    if name is None and len(entries) == 1:
        name = next(iter(entries))
    elif name is None and len(averaged) == 1 and len(plain) == len(usual) <= 1:
        name = averaged[0]
    elif name is None and len(usual) == 1 and not averaged:
        name = usual[0]
    elif name is None:
        raise UserError(
            printable(
                f"{path} holds several networks: {_listing(entries)}; say which with "
                f"--entry={next(iter(entries))}."
            )
        )
    if name:
        others = [repr(n) for n in entries if n != name]
        beside = f" (beside it: {', '.join(others[:4])})" if others else ""
        kind = "averaged weights" if name in averaged else "weights"
        steps.append(f"took the {kind} under {name!r}{beside}")
    return entries[name]


def below(weights: dict[str, Any], prefix: str, path: str) -> dict[str, Any]:
    """The names that begin with a prefix, without it; `DataParallel` may be before."""
    start = re.compile(rf"(?:(?:module|_orig_mod)\.)*{re.escape(prefix)}\.(.+)")
    matches = {name: start.fullmatch(name) for name in weights}
    taken = {m[1]: weights[name] for name, m in matches.items() if m}
    if not taken:
        raise UserError(f"--entry={prefix}: no name in {path} begins with '{prefix}.'.")
    return taken


def printable(text: str) -> str:
    """Nothing in a file's names can steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:1000])
