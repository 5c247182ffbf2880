"""Where the input normalisation of imported weights comes from."""

import ast
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from atebm_jax.archs import CIFAR10, IMAGENET
from atebm_jax.errors import UserError

NORMALIZATIONS: dict[str, dict[str, Any]] = {
    "imagenet": IMAGENET,
    "cifar10": CIFAR10,
    "none": {"mean": (), "std": ()},
}

# mean and std in a file are rounded to float32, and to few digits by some.
_SAME = 1e-4


class Normalization(NamedTuple):
    """Input normalisation inside the network, and what it rests on."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str


def parse(name: str | None, mean: str | None, std: str | None) -> Normalization | None:
    """What the flags ask for, or None where they say nothing.

    Raises:
      UserError: an unknown name, one number list without the other, or no numbers.
    """
    if name is not None and (mean is not None or std is not None):
        raise UserError("--normalization and --mean/--std exclude each other.")
    if name is not None:
        if name not in NORMALIZATIONS:
            raise UserError(
                f"unknown --normalization={name}: choose one of "
                f"{', '.join(NORMALIZATIONS)}, or give --mean and --std."
            )
        values = NORMALIZATIONS[name]
        origin = f"--normalization={name}"
        return Normalization(tuple(values["mean"]), tuple(values["std"]), origin)
    if (mean is None) != (std is None):
        raise UserError("--mean and --std go together: give both.")
    if mean is None or std is None:
        return None
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
    in_file: tuple[tuple[float, ...], tuple[float, ...]] | None,
    by_architecture: tuple[Sequence[float], Sequence[float]],
    channels: int,
) -> Normalization:
    """The normalisation inside the network: flags, else the file, else the usual one.

    Args:
      asked: as of `parse`.
      in_file: (mean, std) that the file keeps beside the weights.
      by_architecture: (mean, std) of the architecture's public weights; () for none.
      channels: of the images.

    Raises:
      UserError: flags against the file, or numbers for another count of channels.
    """
    if in_file is not None:
        given = Normalization(*in_file, "the file")
        if asked is not None and not _same(asked, given):
            raise UserError(
                f"{asked.origin} means mean {asked.mean} and std {asked.std}, the file "
                f"itself has mean {given.mean} and std {given.std}: leave the flag out."
            )
        chosen = given
    elif asked is not None:
        chosen = asked
    else:
        mean, std = map(tuple, by_architecture)
        usual = (
            "as usual for the architecture"
            if not mean
            else ("the usual one of the architecture, as the file has none")
        )
        if len(mean) not in (0, channels):
            mean, std, usual = (), (), "the usual one is for colour images"
        chosen = Normalization(mean, std, usual)
    if len(chosen.mean) == 1 and channels > 1:
        chosen = chosen._replace(mean=chosen.mean * channels, std=chosen.std * channels)
    if len(chosen.mean) not in (0, channels) or len(chosen.mean) != len(chosen.std):
        raise UserError(
            f"the normalisation of {chosen.origin} has {len(chosen.mean)} and "
            f"{len(chosen.std)} numbers, the network's images have {channels} channels."
        )
    return chosen


def _same(one: Normalization, other: Normalization) -> bool:
    return all(
        len(a) == len(b) and np.allclose(a, b, rtol=0, atol=_SAME)
        for a, b in ((one.mean, other.mean), (one.std, other.std))
    )
