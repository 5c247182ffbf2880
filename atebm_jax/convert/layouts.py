"""Finds the weights in what was saved, and takes the wrappers off their names.

Training states, averaged copies, `DataParallel`, attack wrappers and networks with
their normalisation in front all end as one plain state dict; whatever was taken off is
said in `Weights.steps`.
"""

import collections
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from atebm_jax.convert import entries, normalization
from atebm_jax.convert.files import Source, is_array, printable, shape
from atebm_jax.convert.names import begins_network, family_of, looks_like_network
from atebm_jax.errors import UserError


@dataclass
class Weights:
    """One network's plain state dict, from which the wrappers come off one by one.

    Attributes:
      arrays: by PyTorch name, without wrappers; leaves of a source's tree.
      steps: what was chosen and taken off, a phrase each.
      constants: "mean" and "std" of the input normalisation, where they are kept beside
        the weights.
      others: what `--entry` takes other weights of the file by.
      prefix: what `--entry` has in front of the names.
      is_given: `--entry` gave a prefix of names: nothing is to be chosen any more.
    """

    arrays: dict[str, Any]
    steps: list[str] = field(default_factory=list)
    constants: dict[str, tuple[float, ...]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    prefix: str = ""
    is_given: bool = False

    def enter(self, wrapper: str) -> None:
        """Notes that a first part of the names is off."""
        # `_below` passes over the transparent ones.
        if wrapper and not re.fullmatch(_TRANSPARENT, wrapper):
            self.prefix += f"{wrapper}."


_MOST_WRAPPERS = 32
_MOST_COPIES = 16

_NORMALIZER = re.compile(
    r"(?:(?:normali[sz]er?|normali[sz]ation|normali[sz]e_layer|norm|preprocess|0|"
    r"attacker\.normali[sz]er?)\.)?"
    r"(?:new_)?(mean|means|mu|std|stds|sd|sds|sigma)"
)


# Words that names of counters are made of: arrays of one number that say how long a
# network was trained or averaged ("num_updates", "swa_n").
_COUNTED = frozenset(
    {
        *("n", "num", "number", "count", "counter", "total", "global", "current"),
        *("update", "updates", "step", "steps", "iter", "iters", "iteration"),
        *("iterations", "epoch", "epochs", "batches", "samples", "averaged"),
        *("initted", "inited", "decay", "ema", "swa", "train", "training"),
    }
)

# Modules that wrap another one at any depth, compute nothing and have no arrays:
# parallel training, compilation, sharding, recomputation, private gradients.
_TRANSPARENT = (
    r"(?:_?module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|"
    r"_fpw_module|_forward_module)"
)


def find(source: Source, entry: str | None = None) -> Weights:
    """The plain state dict of a source.

    Args:
      source: an opened file.
      entry: which of several networks to take, as the refusal names them.

    Raises:
      UserError: no weights, or several networks of which none is meant.
    """
    weights = _chosen(source, entry)
    for _ in range(_MOST_WRAPPERS):
        before = set(weights.arrays)
        _pass_over_counters(weights)
        _take_normalizer(source, weights)
        _drop_attacker(source, weights)
        _take_heads(weights)
        _take_off_wrapper(source, weights)
        if set(weights.arrays) == before:
            break
    else:
        raise UserError(
            f"{source.path} is refused: its names have more than {_MOST_WRAPPERS} "
            "wrappers."
        )
    if len(weights.constants) == 1:
        raise UserError(
            f"{source.path} has only the {next(iter(weights.constants))} of an input "
            "normalisation: give --mean and --std."
        )
    return weights


def _chosen(source: Source, entry: str | None) -> Weights:
    """The entry of the file that is meant, with its wrappers."""
    networks = entries.collect(source)
    if not networks:
        raise UserError(entries.nothing(source))
    name, inside = entries.split(entry, networks)
    steps = entries.unusable_averages(source, networks)
    if name is None:
        networks = entries.whole(networks, steps)
    name = entries.choose(networks, name, source.path, steps)
    arrays = _without_inner_wrappers(networks[name], steps)
    if inside:
        arrays = _below(arrays, _plain_name(inside), source.path)
        steps.append(f"took the names under {inside!r}")
    dropped = [n for n, value in arrays.items() if not is_array(value)]
    for n in dropped:
        del arrays[n]
    if dropped:
        steps.append(f"passed over {', '.join(map(repr, dropped[:4]))}: no arrays")
    constants = _metadata(source)
    if constants:
        steps.append("took mean and std from the file's metadata")
    others = [n for n in networks if n and n != name]
    prefix = f"{name}." if name else ""
    return Weights(arrays, steps, constants, others, prefix, bool(inside))


def _below(weights: dict[str, Any], prefix: str, path: str) -> dict[str, Any]:
    """The names that begin with a prefix, without it; wrappers may be before it."""
    start = re.compile(rf"(?:{_TRANSPARENT}\.)*{re.escape(prefix)}\.(.+)")
    matches = {name: start.fullmatch(name) for name in weights}
    taken = {m[1]: weights[name] for name, m in matches.items() if m}
    if not taken:
        raise UserError(f"--entry={prefix}: no name in {path} begins with '{prefix}.'.")
    return taken


def _plain_name(name: str) -> str:
    """A name without what wraps modules inside of the network.

    What stands in front stays: all names may share it, or it may part two networks.
    """
    front = re.match(rf"(?:{_TRANSPARENT}\.)*", name)
    start = front.end() if front else 0
    return name[:start] + re.sub(rf"(?<=\.){_TRANSPARENT}\.", "", name[start:])


def _without_inner_wrappers(named: dict[str, Any], steps: list[str]) -> dict[str, Any]:
    """Takes out of the names what wraps modules inside of the network.

    Two names that would become one stay as they are.
    """
    changed = {name: _plain_name(name) for name in named}
    count = collections.Counter(changed.values())
    weights, taken = {}, 0
    for name, value in named.items():
        alone = count[changed[name]] == 1
        weights[changed[name] if alone else name] = value
        taken += alone and changed[name] != name
    if taken:
        steps.append(f"took the names of wrapping modules out of {taken} names")
    return weights


def _pass_over_counters(weights: Weights) -> None:
    single = [n for n, value in weights.arrays.items() if math.prod(shape(value)) == 1]
    counters = [n for n in single if _is_counter(n.rpartition(".")[2])]
    # What they say is read where the normalisation is.
    switches = [n for n in single if normalization.is_switch(n)]
    for name in counters + switches:
        del weights.arrays[name]
    if "n_averaged" in counters:
        weights.steps.append("weights of an AveragedModel ('n_averaged')")
    named = [repr(name) for name in counters if name != "n_averaged"]
    if named:
        weights.steps.append(f"passed over counters: {', '.join(named[:4])}")


def _is_counter(name: str) -> bool:
    words = name.lower().split("_")
    return _COUNTED.issuperset(words)


def _take_heads(weights: Weights) -> None:
    """JEM's network `f` and its two heads, as one classifier.

    `class_output` reads the features of `f`, whose own last layer nothing uses; the
    energy is that of the classes, not `energy_output` (Grathwohl et al., 2020).
    """
    inner = {n[2:]: v for n, v in weights.arrays.items() if n.startswith("f.")}
    heads = {n: v for n, v in weights.arrays.items() if not n.startswith("f.")}
    parts = {n.partition(".")[0] for n in heads}
    if not inner or parts not in ({"class_output"}, {"class_output", "energy_output"}):
        return
    unused = ("fc", "linear")
    taken = {n: v for n, v in inner.items() if n.partition(".")[0] not in unused}
    for name, value in heads.items():
        first, _, leaf = name.partition(".")
        if first == "class_output":
            taken[f"fc.{leaf}"] = value
    weights.arrays = taken
    weights.steps.append(
        "took JEM's network under 'f' with 'class_output' as its last layer; "
        "passed over 'energy_output' and the last layer of 'f', which it does not use"
    )


def _take_normalizer(source: Source, weights: Weights) -> None:
    path, constants = source.path, weights.constants
    for name in list(weights.arrays):
        match = _NORMALIZER.fullmatch(name)
        if not match or not 1 <= math.prod(shape(weights.arrays[name])) <= 4:
            continue
        kind = "mean" if match[1].startswith("m") else "std"
        array = source.read(weights.arrays.pop(name)).astype(np.float64).ravel()
        values = tuple(float(np.float32(x)) for x in array)
        if constants.setdefault(kind, values) != values:
            raise UserError(
                f"{path} normalises twice and differently: {name} is {values}, "
                f"another {kind} {constants[kind]}; choose a part with --entry."
            )
        if not all(0 <= x <= 1 for x in values) or (kind == "std" and min(values) <= 0):
            raise UserError(
                f"{path}: {name} is {values}, no {kind} of images in [0, 1]."
            )
        weights.steps.append(f"took {kind} from {name!r}")


def _metadata(source: Source) -> dict[str, tuple[float, ...]]:
    """mean and std that the export of this project writes beside the arrays."""
    found = {}
    for kind in ("mean", "std"):
        try:
            values = json.loads(source.metadata.get(f"atebm_jax.{kind}", "null"))
            found[kind] = tuple(map(float, values or ()))
        except (TypeError, ValueError, RecursionError):
            return {}
        if not all(math.isfinite(x) and (kind == "mean" or x > 0) for x in found[kind]):
            raise UserError(
                f"{source.path}: its metadata has {kind} {found[kind]}, with which no "
                "image can be normalised."
            )
    return found if "atebm_jax.mean" in source.metadata else {}


def _drop_attacker(source: Source, weights: Weights) -> None:
    """Drops the copy that the robustness library's attacker keeps of the network."""
    arrays, prefix = weights.arrays, weights.prefix
    copies = [n for n in arrays if n.startswith("attacker.")]
    for name in copies:
        original = name.removeprefix("attacker.")
        if original in arrays and _equal(source, arrays[name], arrays[original]):
            continue
        raise UserError(
            printable(
                f"{source.path}: {name} should be the same array as {original}, and "
                f"{'differs' if original in arrays else 'that is missing'}: choose "
                f"one with --entry={prefix}attacker.model or --entry={prefix}model."
            )
        )
    for name in copies:
        del arrays[name]
    if copies:
        weights.steps.append(f"dropped {len(copies)} equal copies under 'attacker.'")


def _equal(source: Source, one: Any, other: Any) -> bool:
    if shape(one) != shape(other):
        return False
    a, b = source.read(one), source.read(other)
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _take_off_wrapper(source: Source, weights: Weights) -> None:
    """Takes the wrapper off that all names share, or one of the usual ones."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in weights.arrays.items():
        first, dot, inner = name.partition(".")
        if dot:
            groups.setdefault(first, {})[inner] = value
    first, inside = next(iter(groups.items()), ("", {}))
    if len(weights.arrays) == len(inside) > 1 and not begins_network(first):
        weights.steps.append(f"took off the prefix {first + '.'!r}")
        weights.arrays = inside
        weights.enter(first)
        return
    wrapped = {g: names for g, names in groups.items() if _is_wrapper(g, names)}
    if wrapped and not weights.is_given:
        _take_one_of(wrapped, source, weights)


def _take_one_of(
    wrapped: dict[str, dict[str, Any]], source: Source, weights: Weights
) -> None:
    """Takes one of the networks under wrappers, or the one beside them.

    Names beside a wrapper belong to the network in it: a last layer, say.
    """
    networks, rest = wrapped, _outside(weights.arrays, wrapped)
    if family_of(rest):
        # A network without a prefix, and perhaps others beside it.
        rivals = {g: x for g, x in wrapped.items() if _is_rival(g, x, rest)}
        if rivals:
            networks = {"": _outside(weights.arrays, rivals), **rivals}
    networks = entries.whole(networks, weights.steps)
    name = entries.choose(networks, None, source.path, weights.steps, weights.prefix)
    weights.others += [f"{weights.prefix}{n}" for n in networks if n and n != name]
    if "" in networks:
        weights.arrays = networks[name]
    elif rest.keys() & wrapped[name].keys():
        return
    else:
        if any(len(shape(value)) >= 2 for value in rest.values()):
            weights.others.append(f"{weights.prefix}{name}")
        _say_filled(name, wrapped[name], rest, weights.steps)
        weights.arrays = wrapped[name] | rest
    weights.enter(name)


def _say_filled(
    name: str, names: Iterable[str], rest: Iterable[str], steps: list[str]
) -> None:
    """Says that averages of parameters alone stand beside statistics of the network."""
    own = [n for n in rest if _is_statistic(n)]
    if entries.is_averaged(name) and own and not any(map(_is_statistic, names)):
        steps.append(
            f"the averages under {name!r} have no batch statistics: took the "
            f"network's own, which are no averages ({printable(own[0])!r}, ...)"
        )


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def _outside(weights: dict[str, Any], groups: Iterable[str]) -> dict[str, Any]:
    """The names whose first part is none of `groups`."""
    return {n: v for n, v in weights.items() if n.partition(".")[0] not in groups}


def _is_wrapper(name: str, names: Iterable[str]) -> bool:
    """Whether a first part of names stands for a network or for what wraps one."""
    if not name or entries.is_averaged(name):
        return bool(name)
    usual = name in entries.NETWORKS | entries.ROLES
    usual = usual or re.fullmatch(_TRANSPARENT, name) is not None
    return (usual or looks_like_network(names)) and not begins_network(name)


def _is_rival(name: str, names: Iterable[str], rest: Mapping[str, Any]) -> bool:
    """Whether names under a prefix are another network than the rest."""
    collide = any(n in rest for n in names)
    return collide or entries.is_averaged(name) or looks_like_network(names)


def read_arrays(source: Source, weights: Weights) -> dict[str, np.ndarray]:
    """The weights as float32 arrays; notes go to `weights.steps`.

    Raises:
      UserError: NaN, Inf, values that float32 cannot hold, or no numbers at all, by
        name; many times the numbers that the file has.
    """
    arrays: dict[str, np.ndarray] = {}
    narrowed: dict[str, int] = {}
    # Names may share numbers, which become copies here.
    left = _MOST_COPIES * os.path.getsize(source.path)
    for name, value in weights.arrays.items():
        if name.rpartition(".")[2] == "num_batches_tracked":
            continue
        array = source.read(value)
        left -= array.size
        if left < 0:
            raise UserError(
                f"{source.path} is refused: its arrays share their numbers, and are "
                f"{_MOST_COPIES} times the file."
            )
        real = array.dtype.kind in "fiub" or array.dtype == ml_dtypes.bfloat16
        if not array.size or not real:
            raise UserError(
                printable(
                    f"{source.path}: {name} is {array.dtype}{list(array.shape)}: "
                    "expected real numbers, one at least."
                )
            )
        if array.dtype != np.float32 and array.dtype.kind not in "iub":
            narrowed[str(array.dtype)] = narrowed.get(str(array.dtype), 0) + 1
            with np.errstate(over="ignore"):
                array = array.astype(np.float32)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(
                printable(
                    f"{source.path}: {name} holds NaN or Inf: these weights diverged "
                    "or are damaged; choose an earlier checkpoint."
                )
            )
        arrays[name] = array
    for kind, count in narrowed.items():
        weights.steps.append(f"{count} arrays were {kind} and become float32")
    return arrays
