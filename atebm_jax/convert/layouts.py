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
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from atebm_jax.convert import normalization
from atebm_jax.convert.detect import family_of, looks_like_network
from atebm_jax.convert.entries import (
    NETWORKS,
    ROLES,
    below,
    choose,
    collect,
    is_averaged,
    is_transparent,
    nothing,
    printable,
    shape,
    split,
    unusable_averages,
    whole,
    without_inner_wrappers,
)
from atebm_jax.convert.files import Source, is_array
from atebm_jax.errors import UserError


class Weights(NamedTuple):
    """One network's plain state dict.

    Attributes:
      arrays: by PyTorch name, without wrappers; leaves of a source's tree.
      mean, std: input normalisation kept beside the weights; None where there is none.
      steps: what was chosen and taken off, a phrase each.
      others: what `--entry` takes other weights of the file by.
    """

    arrays: dict[str, Any]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    steps: list[str]
    others: tuple[str, ...] = ()


_MOST_WRAPPERS = 32
_MOST_COPIES = 16

# First parts of names that belong to a network and not to a wrapper.
_OWN = re.compile(
    r"conv1|bn1|fc|head|norm|stem|stages|blocks|features|classifier|encoder|"
    r"patch_embed|conv_proj|heads|downsample_layers|(layer|block)\d"
)

_NORMALIZER = re.compile(
    r"(?:(?:normali[sz]er?|normali[sz]ation|normali[sz]e_layer|norm|preprocess|0|"
    r"attacker\.normali[sz]er?)\.)?"
    r"(?:new_)?(mean|means|mu|std|stds|sd|sds|sigma)"
)


# Arrays of one number that say how long a network was trained or averaged.
_COUNTERS = frozenset(
    {
        *("n_averaged", "num_updates", "n_updates", "updates", "initted", "inited"),
        *("step", "steps", "global_step", "num_steps", "iteration", "iterations"),
        *("iter", "iters", "num_iters", "epoch", "decay", "ema_decay"),
    }
)


def find(source: Source, entry: str | None = None) -> Weights:
    """The plain state dict of a source.

    Args:
      source: an opened file.
      entry: which of several networks to take, as the refusal names them.

    Raises:
      UserError: no weights, or several networks of which none is meant.
    """
    steps: list[str] = []
    entries = collect(source)
    if not entries:
        raise UserError(nothing(source))
    name, inside = split(entry, entries)
    steps += unusable_averages(source, entries)
    if name is None:
        entries = whole(entries, steps)
    known = choose(entries, name, source.path, steps)
    weights = _unwrap_inside(entries[known], steps)
    if inside:
        weights = below(weights, without_inner_wrappers(inside), source.path)
        steps.append(f"took the names under {inside!r}")
    dropped = [n for n, value in weights.items() if not is_array(value)]
    for n in dropped:
        del weights[n]
    if dropped:
        steps.append(f"passed over {', '.join(map(repr, dropped[:4]))}: no arrays")
    others = [n for n in entries if n and n != known]
    prefix = f"{known}." if known else ""
    return _unwrap(source, weights, steps, others, chosen=bool(inside), prefix=prefix)


def _unwrap_inside(named: dict[str, Any], steps: list[str]) -> dict[str, Any]:
    """Takes out of the names what wraps modules inside of the network.

    Two names that would become one stay as they are.
    """
    changed = {name: without_inner_wrappers(name) for name in named}
    count = collections.Counter(changed.values())
    weights, taken = {}, 0
    for name, value in named.items():
        alone = count[changed[name]] == 1
        weights[changed[name] if alone else name] = value
        taken += alone and changed[name] != name
    if taken:
        steps.append(f"took the names of wrapping modules out of {taken} names")
    return weights


def _unwrap(
    source: Source,
    weights: dict[str, Any],
    steps: list[str],
    others: list[str],
    *,
    chosen: bool,
    prefix: str,
) -> Weights:
    """Takes off one layer after the other, until there is none."""
    constants = _metadata(source)
    if constants:
        steps.append("took mean and std from the file's metadata")
    for _ in range(_MOST_WRAPPERS):
        before = set(weights)
        _pass_over_counters(weights, steps)
        _take_normalizer(source, weights, constants, steps)
        _drop_attacker(source, weights, steps, prefix)
        weights = _take_heads(weights, steps)
        weights, taken = _strip(source, weights, steps, others, chosen, prefix)
        prefix += taken
        if set(weights) == before:
            break
    else:
        raise UserError(
            f"{source.path} is refused: its names have more than {_MOST_WRAPPERS} "
            "wrappers."
        )
    if len(constants) == 1:
        raise UserError(
            f"{source.path} has only the {next(iter(constants))} of an input "
            "normalisation: give --mean and --std."
        )
    mean, std = constants.get("mean"), constants.get("std")
    return Weights(weights, mean, std, steps, tuple(others))


def _pass_over_counters(weights: dict[str, Any], steps: list[str]) -> None:
    single = [n for n, value in weights.items() if math.prod(shape(value)) == 1]
    counters = [n for n in single if n.rpartition(".")[2] in _COUNTERS]
    # What they say is read where the normalisation is.
    switches = [n for n in single if normalization.is_switch(n)]
    for name in counters + switches:
        del weights[name]
    if "n_averaged" in counters:
        steps.append("weights of an AveragedModel ('n_averaged')")
    named = [repr(name) for name in counters if name != "n_averaged"]
    if named:
        steps.append(f"passed over counters: {', '.join(named[:4])}")


def _take_heads(weights: dict[str, Any], steps: list[str]) -> dict[str, Any]:
    """JEM's network `f` and its two heads, as one classifier.

    `class_output` reads the features of `f`, whose own last layer nothing uses; the
    energy is that of the classes, not `energy_output` (Grathwohl et al., 2020).
    """
    inner = {n[2:]: v for n, v in weights.items() if n.startswith("f.")}
    heads = {n: v for n, v in weights.items() if not n.startswith("f.")}
    parts = {n.partition(".")[0] for n in heads}
    if not inner or parts not in ({"class_output"}, {"class_output", "energy_output"}):
        return weights
    unused = ("fc", "linear")
    taken = {n: v for n, v in inner.items() if n.partition(".")[0] not in unused}
    for name, value in heads.items():
        first, _, leaf = name.partition(".")
        if first == "class_output":
            taken[f"fc.{leaf}"] = value
    steps.append(
        "took JEM's network under 'f' with 'class_output' as its last layer; "
        "passed over 'energy_output' and the last layer of 'f', which it does not use"
    )
    return taken


def _take_normalizer(
    source: Source,
    weights: dict[str, Any],
    constants: dict[str, tuple[float, ...]],
    steps: list[str],
) -> None:
    for name in list(weights):
        match = _NORMALIZER.fullmatch(name)
        if not match or not 1 <= math.prod(shape(weights[name])) <= 4:
            continue
        kind = "mean" if match[1].startswith("m") else "std"
        array = source.read(weights.pop(name)).astype(np.float64).ravel()
        values = tuple(float(np.float32(x)) for x in array)
        if constants.setdefault(kind, values) != values:
            raise UserError(
                f"{source.path} normalises twice and differently: {name} is {values}, "
                f"another {kind} {constants[kind]}; choose a part with --entry."
            )
        if not all(0 <= x <= 1 for x in values) or (kind == "std" and min(values) <= 0):
            raise UserError(
                f"{source.path}: {name} is {values}, no {kind} of images in [0, 1]."
            )
        steps.append(f"took {kind} from {name!r}")


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


def _drop_attacker(
    source: Source, weights: dict[str, Any], steps: list[str], prefix: str
) -> None:
    """Drops the copy that the robustness library's attacker keeps of the network."""
    copies = [n for n in weights if n.startswith("attacker.")]
    for name in copies:
        original = name.removeprefix("attacker.")
        if original in weights and _equal(source, weights[name], weights[original]):
            continue
        raise UserError(
            printable(
                f"{source.path}: {name} should be the same array as {original}, and "
                f"{'differs' if original in weights else 'that is missing'}: choose "
                f"one with --entry={prefix}attacker.model or --entry={prefix}model."
            )
        )
    for name in copies:
        del weights[name]
    if copies:
        steps.append(f"dropped {len(copies)} equal copies under 'attacker.'")


def _equal(source: Source, one: Any, other: Any) -> bool:
    if shape(one) != shape(other):
        return False
    a, b = source.read(one), source.read(other)
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _strip(
    source: Source,
    weights: dict[str, Any],
    steps: list[str],
    others: list[str],
    chosen: bool,
    prefix: str,
) -> tuple[dict[str, Any], str]:
    """Takes the wrapper off that all names share, or one of the usual ones.

    Returns:
      (the weights, what `--entry` has in front of their names beside `prefix`).
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, value in weights.items():
        first, dot, inner = name.partition(".")
        if dot:
            groups.setdefault(first, {})[inner] = value
    shared = len(weights) > 1 and any(len(g) == len(weights) for g in groups.values())
    first = next(iter(groups), "")
    if shared and not _OWN.fullmatch(first):
        steps.append(f"took off the prefix {first + '.'!r}")
        # `entries.below` passes over the transparent ones.
        return groups[first], "" if is_transparent(first) else f"{first}."
    wrapped = {g: names for g, names in groups.items() if _is_wrapper(g, names)}
    if not wrapped or chosen:
        return weights, ""
    networks, rest = wrapped, _outside(weights, wrapped)
    if family_of(rest):
        # A network without a prefix, and perhaps others beside it.
        rivals = {g: x for g, x in wrapped.items() if _is_rival(g, x, rest)}
        if rivals:
            networks = {"": _outside(weights, rivals), **rivals}
    networks = whole(networks, steps)
    name = choose(networks, None, source.path, steps, prefix)
    others += [f"{prefix}{n}" for n in networks if n and n != name]
    if "" not in networks:
        if rest.keys() & wrapped[name].keys():
            return weights, ""
        if any(len(shape(value)) >= 2 for value in rest.values()):
            others.append(f"{prefix}{name}")
        _say_filled(name, wrapped[name], rest, steps)
        return wrapped[name] | rest, "" if is_transparent(name) else f"{name}."
    return networks[name], f"{name}." if name else ""


def _say_filled(
    name: str, names: Iterable[str], rest: Iterable[str], steps: list[str]
) -> None:
    """Says that averages of parameters alone stand beside statistics of the network."""
    own = [n for n in rest if _is_statistic(n)]
    if is_averaged(name) and own and not any(map(_is_statistic, names)):
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
    if not name or is_averaged(name):
        return bool(name)
    usual = name in NETWORKS | ROLES or is_transparent(name)
    return (usual or looks_like_network(names)) and not _OWN.fullmatch(name)


def _is_rival(name: str, names: Iterable[str], rest: Mapping[str, Any]) -> bool:
    """Whether names under a prefix are another network than the rest."""
    collide = any(n in rest for n in names)
    return collide or is_averaged(name) or looks_like_network(names)


def _is_bfloat16(array: np.ndarray) -> bool:
    return array.dtype == ml_dtypes.bfloat16


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
        if not array.size or not (array.dtype.kind in "fiub" or _is_bfloat16(array)):
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
