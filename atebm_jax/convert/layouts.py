"""Finds the weights in what was saved, and takes the wrappers off their names.

Training states, averaged copies, `DataParallel`, attack wrappers and networks with
their normalisation in front all become one plain state dict. `Weights.steps` says what
was removed.
"""

import collections
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from atebm_jax.convert import entries, normalization
from atebm_jax.convert.files import Source, is_array, refusal, shown
from atebm_jax.convert.names import begins_network, family_of, looks_like_network


@dataclass
class Weights:
    """One network's plain state dict, from which the wrappers come off one by one."""

    # By PyTorch name: leaves of a source's tree.
    arrays: dict[str, Any]
    # One phrase for each choice and each removed wrapper.
    steps: list[str] = field(default_factory=list)
    # "mean" and "std" of the input normalisation, where the file has them.
    constants: dict[str, tuple[float, ...]] = field(default_factory=dict)
    # Values of `--entry` for the other networks of the file, and how one begins.
    others: list[str] = field(default_factory=list)
    prefix: str = ""
    # Whether `--entry` gave a prefix of names: then nothing more is chosen.
    is_given: bool = False


_MOST_WRAPPERS = 32
_MOST_COPIES = 16

# Usual names of the network in a training state, and of wrapping modules.
_NETWORKS = frozenset(
    {
        *("state_dict", "model", "model_state_dict", "model_state", "net", "network"),
        *("base_model", "module", "weights", "params", "classifier"),
        *("online_model", "online"),
    }
)

# Names of networks in pairs, of which neither is the usual one to take.
_ROLES = frozenset({"student", "teacher", "target", "target_model", "momentum_encoder"})

# Every network has all of these; a copy of its parameters alone does not.
_STATISTICS = frozenset({"running_mean", "running_var"})
_KINDS = frozenset({"weight", "bias"}) | _STATISTICS

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

_NORMALIZER = re.compile(
    r"(?:(?:normali[sz]er?|normali[sz]ation|normali[sz]e_layer|norm|preprocess|0|"
    r"attacker\.normali[sz]er?)\.)?"
    r"(?:new_)?(mean|means|mu|std|stds|sd|sds|sigma)"
)

# Modules that wrap another one at any depth and have no arrays of their own: parallel
# training, compilation, sharding, recomputation, private gradients.
_TRANSPARENT = (
    r"(?:_?module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|"
    r"_fpw_module|_forward_module)"
)
_INNER_WRAPPERS = re.compile(rf"(?<=\.){_TRANSPARENT}\.")


def find(source: Source, entry: str | None = None) -> Weights:
    """The plain state dict of a source.

    Args:
      source: an opened file.
      entry: which of several networks to take, as the refusal names them.

    Raises:
      UserError: no weights, or several networks of which none is meant.
    """
    weights = _entered(source, entry)
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
        raise refusal(
            f"{source.path} is refused: its names have more than {_MOST_WRAPPERS} "
            "wrappers."
        )
    if len(weights.constants) == 1:
        raise refusal(
            f"{source.path} has only the {next(iter(weights.constants))} of an input "
            "normalisation: give --mean and --std."
        )
    weights.steps = list(map(shown, weights.steps))
    return weights


def _entered(source: Source, entry: str | None) -> Weights:
    """The entry of the file that is meant, still with its wrappers."""
    networks = entries.collect(source)
    asked, inside = entries.split(entry, networks)
    steps = entries.unusable_averages(source, networks)
    weights = Weights({}, steps, is_given=bool(inside))
    name = _choose(networks, asked, source, weights)
    weights.prefix = f"{name}." if name else ""
    held = networks[name]
    weights.arrays = {n: value for n, value in held.items() if is_array(value)}
    dropped = [repr(n) for n in held if n not in weights.arrays]
    if dropped:
        weights.steps.append(f"passed over {', '.join(dropped[:4])}: no arrays")
    _take_out_inner_wrappers(weights)
    if inside:
        _take_given(weights, _INNER_WRAPPERS.sub("", inside), source.path)
        weights.steps.append(f"took the names under {inside!r}")
    _take_metadata(source, weights)
    return weights


def _take_given(weights: Weights, prefix: str, path: str) -> None:
    """Takes the names that begin with a prefix; wrappers may be before it."""
    start = re.compile(rf"(?:{_TRANSPARENT}\.)*{re.escape(prefix)}\.(.+)")
    matches = {name: start.fullmatch(name) for name in weights.arrays}
    firsts = ", ".join(list(_groups(weights.arrays))[:8])
    weights.arrays = {m[1]: weights.arrays[name] for name, m in matches.items() if m}
    if not weights.arrays:
        raise refusal(
            f"--entry={prefix}: no name in {path} begins with '{prefix}.'; the names "
            f"there begin with {firsts}."
        )


def _take_out_inner_wrappers(weights: Weights) -> None:
    """Removes them from the names, but keeps two names that would become the same.

    A wrapper in front stays: all names may share it, or it may separate two networks.
    """
    plain = {name: _INNER_WRAPPERS.sub("", name) for name in weights.arrays}
    count = collections.Counter(plain.values())
    changed = {a: b for a, b in plain.items() if a != b and count[b] == 1}
    weights.arrays = {changed.get(n, n): value for n, value in weights.arrays.items()}
    if changed:
        weights.steps.append(
            f"took the names of wrapping modules out of {len(changed)} names"
        )


def _take_metadata(source: Source, weights: Weights) -> None:
    """Takes mean and std that the export of this project writes beside the arrays."""
    texts = (source.metadata.get(f"atebm_jax.{kind}", "") for kind in ("mean", "std"))
    try:
        mean, std = (tuple(map(float, json.loads(text))) for text in texts)
    except (TypeError, ValueError, RecursionError):
        return
    if not all(map(math.isfinite, mean + std)) or any(x <= 0 for x in std):
        raise refusal(
            f"{source.path}: its metadata has mean {mean} and std {std}, with which no "
            "image can be normalised."
        )
    weights.constants = {"mean": mean, "std": std}
    weights.steps.append("took mean and std from the file's metadata")


def _pass_over_counters(weights: Weights) -> None:
    single = [n for n, value in weights.arrays.items() if math.prod(value.shape) == 1]
    counters = [n for n in single if _COUNTED.issuperset(_last(n).lower().split("_"))]
    # `normalization` reads what the switches say.
    switches = [n for n in single if normalization.is_switch(n)]
    for name in counters + switches:
        del weights.arrays[name]
    if "n_averaged" in counters:
        weights.steps.append("weights of an AveragedModel ('n_averaged')")
    named = [repr(name) for name in counters if name != "n_averaged"]
    if named:
        weights.steps.append(f"passed over counters: {', '.join(named[:4])}")


def _take_heads(weights: Weights) -> None:
    """Makes one classifier of JEM's network `f` and its two heads.

    `class_output` reads the features of `f`, whose own last layer nothing uses; the
    energy is that of the classes, not `energy_output` (Grathwohl et al., 2020).
    """
    groups = _groups(weights.arrays)
    heads = {"class_output", "energy_output"}
    if not {"f", "class_output"} <= groups.keys() <= {"f", *heads}:
        return
    head = {f"fc.{name}": value for name, value in groups["class_output"].items()}
    weights.arrays = _outside(groups["f"], ("fc", "linear")) | head
    weights.steps.append(
        "took JEM's network under 'f' with 'class_output' as its last layer; "
        "passed over 'energy_output' and the last layer of 'f', which it does not use"
    )


def _take_normalizer(source: Source, weights: Weights) -> None:
    path, constants = source.path, weights.constants
    for name in list(weights.arrays):
        match = _NORMALIZER.fullmatch(name)
        if not match or not 1 <= math.prod(weights.arrays[name].shape) <= 4:
            continue
        kind = "mean" if match[1].startswith("m") else "std"
        array = source.read(weights.arrays.pop(name)).astype(np.float64).ravel()
        values = tuple(float(np.float32(x)) for x in array)
        if constants.setdefault(kind, values) != values:
            raise refusal(
                f"{path} normalises twice and differently: {name} is {values}, "
                f"another {kind} {constants[kind]}; choose a part with --entry."
            )
        if not all(0 <= x <= 1 for x in values) or (kind == "std" and min(values) <= 0):
            raise refusal(f"{path}: {name} is {values}, no {kind} of images in [0, 1].")
        weights.steps.append(f"took {kind} from {name!r}")


def _drop_attacker(source: Source, weights: Weights) -> None:
    """Drops the copy that the robustness library's attacker keeps of the network."""
    arrays, prefix = weights.arrays, weights.prefix

    def bits(name: str) -> tuple[Any, ...]:
        array = source.read(arrays[name])
        return array.dtype, array.shape, array.tobytes()

    copies = _groups(arrays).get("attacker", {})
    for original in copies:
        name = f"attacker.{original}"
        if original not in arrays or bits(name) != bits(original):
            raise refusal(
                f"{source.path}: {name} should be the same array as {original}, and "
                f"{'differs' if original in arrays else 'that is missing'}: choose "
                f"one with --entry={prefix}attacker.model or --entry={prefix}model."
            )
    if copies:
        weights.arrays = _outside(arrays, ("attacker",))
        weights.steps.append(f"dropped {len(copies)} equal copies under 'attacker.'")


def _groups(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The names without their first part, by that part; "" has those with one only."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in arrays.items():
        first, dot, inner = name.partition(".")
        group = groups.setdefault(first if dot else "", {})
        group[inner if dot else name] = value
    return groups


def _outside(arrays: Mapping[str, Any], parts: Collection[str]) -> dict[str, Any]:
    """The names whose first part is none of `parts`."""
    return {n: v for n, v in arrays.items() if n.partition(".")[0] not in parts}


def _take_off_wrapper(source: Source, weights: Weights) -> None:
    """Removes the wrapper that all names share, or one of the usual wrappers."""
    groups = _groups(weights.arrays)
    first = next(iter(groups), "")
    shared = first and len(groups) == 1 and len(weights.arrays) > 1
    if shared and not begins_network(first):
        weights.steps.append(f"took off the prefix {first + '.'!r}")
        _enter(weights, first, groups[first])
        return
    wrapped = {g: names for g, names in groups.items() if _is_wrapper(g, names)}
    if wrapped and not weights.is_given:
        _take_one_of(wrapped, source, weights)


def _enter(weights: Weights, wrapper: str, arrays: dict[str, Any]) -> None:
    weights.arrays = arrays
    # `_take_given` skips the transparent wrappers.
    if wrapper and not re.fullmatch(_TRANSPARENT, wrapper):
        weights.prefix += f"{wrapper}."


def _take_one_of(
    wrapped: dict[str, dict[str, Any]], source: Source, weights: Weights
) -> None:
    """Takes one of the networks under wrappers, or the one beside them.

    Names beside a wrapper belong to the network in it: a last layer, say.
    """
    networks, rest = wrapped, _outside(weights.arrays, wrapped)
    if family_of(rest):
        # A network without a prefix, and perhaps others beside it.
        rivals = {
            group: names
            for group, names in wrapped.items()
            if names.keys() & rest.keys()
            or entries.is_averaged(group)
            or looks_like_network(names)
        }
        if rivals:
            networks = {"": _outside(weights.arrays, rivals), **rivals}
    name = _choose(networks, None, source, weights)
    if "" in networks:
        _enter(weights, name, networks[name])
    elif not rest.keys() & wrapped[name].keys():
        if any(len(value.shape) >= 2 for value in rest.values()):
            weights.others.append(f"{weights.prefix}{name}")
        own = [n for n in rest if _last(n) in _STATISTICS]
        theirs = any(_last(n) in _STATISTICS for n in wrapped[name])
        if entries.is_averaged(name) and own and not theirs:
            weights.steps.append(
                f"the averages under {name!r} have no batch statistics: took the "
                f"network's own, which are no averages ({own[0]!r}, ...)"
            )
        _enter(weights, name, wrapped[name] | rest)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _is_wrapper(name: str, names: Iterable[str]) -> bool:
    """Whether a first part of names stands for a network or for what wraps one."""
    if not name or entries.is_averaged(name):
        return bool(name)
    usual = name in _NETWORKS | _ROLES or re.fullmatch(_TRANSPARENT, name) is not None
    return (usual or looks_like_network(names)) and not begins_network(name)


def _choose(
    networks: Mapping[str, dict], name: str | None, source: Source, weights: Weights
) -> str:
    """The network to take: the one of this name, or the usual one; "" has no prefix.

    `weights` notes the choice and the other networks.
    """
    if name is None:
        networks = _without_partial_averages(networks, weights)
        name = _meant(networks)
    prefix = weights.prefix
    if name is None:
        flags = [f"--entry={prefix}{n}" for n in networks if n]
        raise refusal(
            f"{source.path} holds several networks: {entries.listing(networks)}; say "
            f"which with {' or '.join(flags[:4])}."
        )
    others = [n for n in networks if n != name]
    if name or others:
        kind = "averaged weights" if entries.is_averaged(name) else "weights"
        where = f"under {name!r}" if name else "without a prefix"
        named = (f"{n!r}, with --entry={prefix}{n}" for n in others[:4] if n)
        beside = ", ".join([*named, *["names without a prefix"] * ("" in others)])
        said = f" (beside it: {beside})" if beside else ""
        weights.steps.append(f"took the {kind} {where}{said}")
    weights.others += [f"{prefix}{n}" for n in others if n]
    return name


def _meant(networks: Mapping[str, Any]) -> str | None:
    """The only network, else its only averages, else the one with a usual name."""
    averaged = [n for n in networks if entries.is_averaged(n)]
    plain = [n for n in networks if n not in averaged]
    usual = [n for n in plain if _is_usual(n)]
    if len(networks) == 1:
        return next(iter(networks))
    if len(averaged) == 1 and len(plain) == len(usual) <= 1:
        return averaged[0]
    return usual[0] if len(usual) == 1 and not averaged else None


def _is_usual(name: str) -> bool:
    """Whether a network has no name of its own, or the usual one."""
    return not name or _last(name) in _NETWORKS


def _without_partial_averages(
    networks: Mapping[str, dict], weights: Weights
) -> dict[str, dict]:
    """Leaves out averages that lack parts of the network beside them."""
    plain = [n for n in networks if not entries.is_averaged(n)]
    if len(plain) != 1 or not _is_usual(plain[0]):
        return dict(networks)
    kinds = {n: _KINDS & set(map(_last, names)) for n, names in networks.items()}
    lacking = {n: sorted(kinds[plain[0]] - kinds[n]) for n in networks}
    for name in (n for n in networks if lacking[n]):
        what = f"under {name!r}: no {' and no '.join(lacking[name])} by name"
        weights.steps.append(f"averages that cannot be used, {what}; {entries.COPY}")
    return {n: names for n, names in networks.items() if not lacking[n]}


def read_arrays(source: Source, weights: Weights) -> dict[str, np.ndarray]:
    """The weights as float32 arrays; notes go to `weights.steps`.

    Raises:
      UserError: NaN, Inf, values that float32 cannot hold, or no numbers at all, by
        name; many times the numbers that the file has.
    """
    arrays: dict[str, np.ndarray] = {}
    narrowed: collections.Counter[str] = collections.Counter()
    # Arrays can share numbers in the file; here each gets a copy.
    left = _MOST_COPIES * os.path.getsize(source.path)
    for name, value in weights.arrays.items():
        if _last(name) == "num_batches_tracked":
            continue
        array = source.read(value)
        left -= array.size
        if left < 0:
            raise refusal(
                f"{source.path} is refused: its arrays share their numbers, and are "
                f"{_MOST_COPIES} times the file."
            )
        arrays[name] = _as_float32(array, f"{source.path}: {name}")
        if arrays[name].dtype != array.dtype:
            narrowed[str(array.dtype)] += 1
    for kind, count in narrowed.items():
        weights.steps.append(f"{count} arrays were {kind} and become float32")
    return arrays


def _as_float32(array: np.ndarray, what: str) -> np.ndarray:
    """Checks an array, and converts floating-point numbers to float32."""
    is_float = array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16
    if not array.size or not (is_float or array.dtype.kind in "iub"):
        raise refusal(
            f"{what} is {array.dtype}{list(array.shape)}: expected real numbers, one "
            "at least."
        )
    if not is_float:
        return array
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise refusal(
            f"{what} holds NaN or Inf: these weights diverged or are damaged; choose "
            "an earlier checkpoint."
        )
    return array
