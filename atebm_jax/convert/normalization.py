"""Where the input normalisation of imported weights comes from."""

import ast
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from atebm_jax.convert import names
from atebm_jax.convert.files import is_array, refusal, shown
from atebm_jax.convert.values import Inert
from atebm_jax.errors import UserError, check_choice
from atebm_jax.models import FAMILIES
from atebm_jax.models.family import AS_THEY_ARE, CIFAR10, IMAGENET

NORMALIZATIONS: dict[str, dict[str, Any]] = {
    "imagenet": IMAGENET,
    "cifar10": CIFAR10,
    "none": AS_THEY_ARE,
    "per_image": AS_THEY_ARE | {"by_image": True},
}

# Files round mean and std to float32, and some to few digits.
_SAME = 1e-4

# The choices for networks for grey images, and whose weights expect which.
_WHO_GREY = "--normalization=none or --mean=0.1307 --std=0.3081 (PyTorch's MNIST), say"


class Normalization(NamedTuple):
    """Input normalisation inside the network, and where it comes from."""

    mean: tuple[float, ...]  # one number a channel; () for none
    std: tuple[float, ...]
    origin: str
    assumed: bool = False
    by_image: bool = False  # each image by its own mean and deviation instead


class Declared(NamedTuple):
    """What a file says about the normalisation."""

    normalizes: bool | None = None  # `normalize_input` and the like
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    origin: str = "the file"  # where that stands, for messages
    by_image: bool = False  # an export of this project says so


_SWITCH = re.compile(
    r"normali[sz]ed?_(inputs?|images?)|(input|image)_normali[sz](e|ed|ation)"
)

# Where training states keep the settings of their run; "" is the state itself.
_SETTINGS = ("", "args", "opt", "config", "cfg", "hparams", "hyper_parameters", "meta")

_ReadFn = Callable[[Any], np.ndarray]


def is_switch(name: Any) -> bool:
    """Whether a name's last part says that images are normalised, or not."""
    last = name.rpartition(".")[2].lower() if isinstance(name, str) else ""
    return _SWITCH.fullmatch(last) is not None


def declared(
    tree: Any, read: _ReadFn, constants: Mapping[str, tuple[float, ...]] | None = None
) -> Declared:
    """Reads what a tree has beside the weights: a switch, or lists of mean and std.

    `constants`, "mean" and "std" among the weights themselves, have precedence.
    """
    found = Declared()
    for place, values in _mappings(tree):
        before = f"{place}." if place else ""
        for key in filter(is_switch, values):
            switch = _truth(values[key], read)
            if switch is not None and found.normalizes is None:
                origin = shown(f"the file: {before}{key} is {switch}")
                found = found._replace(normalizes=switch, origin=origin)
        if place not in _SETTINGS or found.mean:
            continue
        mean, std = (
            next((_few(values[k], read) for k in keys if k in values), ())
            for keys in (("mean", "mu"), ("std", "sigma"))
        )
        if mean and len(mean) == len(std):
            origin = shown(f"the file: {before}mean and {before}std")
            found = found._replace(mean=mean, std=std, origin=origin)
    if constants:
        switch = found.normalizes if constants["mean"] else False
        found = Declared(switch, constants["mean"], constants["std"])
    return found


def _mappings(tree: Any) -> Iterator[tuple[str, dict]]:
    """The mapping and the mappings in it, by name."""
    if not isinstance(tree, dict):
        return
    yield "", tree
    for name, inner in tree.items():
        if isinstance(inner, Inert):
            # An object holds attributes, or items if it is a mapping.
            held = inner.state if isinstance(inner.state, dict) else {}
            inner = held | inner.items
        if isinstance(name, str) and isinstance(inner, dict):
            yield name, inner


def _plain(value: Any, read: _ReadFn) -> Any:
    """The list of a small array's numbers, or the value."""
    if is_array(value) and math.prod(value.shape) <= 3:
        return read(value).ravel().tolist()
    return value


def _truth(value: Any, read: _ReadFn) -> bool | None:
    value = _plain(value, read)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, np.generic):
        value = value.item()
    return bool(value) if isinstance(value, bool | int) and value in (0, 1) else None


def _few(value: Any, read: _ReadFn) -> tuple[float, ...]:
    """One number a channel, in [0, 1]; () for anything else."""
    value = _plain(value, read)
    if not isinstance(value, list | tuple) or len(value) not in (1, 3):
        return ()
    numbers = all(isinstance(x, float | int) and 0 <= x <= 1 for x in value)
    return tuple(map(float, value)) if numbers else ()


def parse(name: str | None, mean: str | None, std: str | None) -> Normalization | None:
    """What the flags ask for, or None where they say nothing.

    Raises:
      UserError: the flags exclude each other, or have no normalisation as their value.
    """
    if name is not None and (mean is not None or std is not None):
        raise UserError("--normalization and --mean/--std exclude each other.")
    if name is not None:
        check_choice("--normalization", name, NORMALIZATIONS)
        origin = f"--normalization={name}"
        return Normalization(**NORMALIZATIONS[name], origin=origin)
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise UserError("--mean and --std go together: give both.")
    pair = _numbers("mean", mean), _numbers("std", std)
    if len(pair[0]) != len(pair[1]) or not all(0 < x <= 1 for x in pair[1]):
        raise UserError(
            f"--mean={mean} and --std={std}: give as many numbers of both, those of "
            "std in (0, 1]."
        )
    return Normalization(*pair, "--mean and --std")


def _numbers(flag: str, text: str) -> tuple[float, ...]:
    try:
        value = ast.literal_eval(text)
        values = tuple(map(float, value if isinstance(value, Sequence) else (value,)))
    except (ValueError, SyntaxError, TypeError):
        values = ()
    if not values or not all(0 <= x <= 1 for x in values):
        raise UserError(
            f"--{flag}={text}: give one number in [0, 1] a channel, "
            f"--{flag}=0.485,0.456,0.406."
        )
    return values


def decide(
    asked: Normalization | None,
    in_file: Declared,
    model: Mapping[str, Any],
    channels: int,
    path: str,
) -> Normalization:
    """The normalisation inside the network: the file's, else the flags', else usual.

    Args:
      asked: what the flags say, as of `parse`.
      in_file: what the file says.
      model: `config.model` of the network, whose images have so many `channels`.
      path: the file, for messages.

    Raises:
      UserError: nobody says it and two conventions are common; flags against the file;
        numbers for another count of channels.
    """
    given = Normalization(in_file.mean, in_file.std, in_file.origin)
    given = given._replace(by_image=in_file.by_image)
    contradicts = in_file.normalizes is False and bool(given.mean)
    if contradicts and asked is None:
        raise refusal(
            f"{path} has mean {given.mean} and std {given.std} and says that its "
            "input is not normalised: give --normalization=none, or --mean and --std."
        )
    says = (given.mean or in_file.normalizes is False) and not contradicts
    if says and asked is not None and not _same(asked, given):
        raise refusal(
            f"{asked.origin} means {described(asked)}, the file itself has "
            f"{described(given)} ({given.origin}): leave the flag out."
        )
    normalizes = asked is not None and (asked.mean or asked.by_image)
    if not says and in_file.normalizes and not normalizes:
        raise refusal(
            f"{path} says that it normalises its input ({given.origin}) and not by "
            "which mean and std: give --mean and --std, or --normalization."
        )
    chosen = given if says else asked or _usual(model, channels, path)
    if len(chosen.mean) == 1:
        chosen = chosen._replace(mean=chosen.mean * channels, std=chosen.std * channels)
    if len(chosen.mean) not in (0, channels) or len(chosen.mean) != len(chosen.std):
        raise refusal(
            f"the normalisation of {chosen.origin} has {len(chosen.mean)} and "
            f"{len(chosen.std)} numbers, the network's images have {channels} channels."
        )
    return chosen


def _usual(model: Mapping[str, Any], channels: int, path: str) -> Normalization:
    """What all public weights of an architecture expect, where they agree."""
    torch = names.known(model["name"])
    values = torch.usual(model)
    if channels == 1 or values is None:
        who = _WHO_GREY if channels == 1 else torch.who
        raise refusal(
            f"{path} does not say how its input is normalised, and two conventions are "
            f"common for a {model['name']}: give {who}."
        )
    usual = "the usual one of the architecture, as the file has none"
    return Normalization(values["mean"], values["std"], usual, True)


def assumption(chosen: Normalization) -> str:
    """A sentence that says what was assumed, and how to change it."""
    return (
        f"input normalisation: {described(chosen)} "
        f"({chosen.origin}): --normalization, or --mean and --std, give another"
    )


def described(of: Normalization) -> str:
    """A normalisation, for a message."""
    if of.by_image:
        return "each image's own mean and standard deviation"
    return f"mean {list(of.mean)}, std {list(of.std)}" if of.mean else "none"


def expected(family: str) -> str:
    """What is known of the normalisation that a family's public weights expect."""
    torch = names.known(family)
    networks: dict[str, list[str]] = {}
    for arch, fields in FAMILIES[family].archs.items():
        usual = torch.usual(fields)
        named = [name for name, values in NORMALIZATIONS.items() if values == usual]
        said = f"give {torch.who}"
        if usual is not None:
            numbers = described(Normalization(usual["mean"], usual["std"], ""))
            said = f"{named[0] if named else numbers} is assumed"
        networks.setdefault(said, []).append(arch)
    if len(networks) == 1:
        return next(iter(networks))
    return "\n".join(f"{' '.join(archs)}: {said}" for said, archs in networks.items())


def _same(one: Normalization, other: Normalization) -> bool:
    return one.by_image == other.by_image and all(
        len(a) == len(b) and np.allclose(a, b, rtol=0, atol=_SAME)
        for a, b in zip(one[:2], other[:2], strict=True)
    )
