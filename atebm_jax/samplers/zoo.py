"""The samplers by name, and how one is written with its settings."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from atebm_jax import calls
from atebm_jax.errors import UserError
from atebm_jax.samplers.adam import adam
from atebm_jax.samplers.base import Sampler
from atebm_jax.samplers.momentum import momentum
from atebm_jax.samplers.pgd import pgd
from atebm_jax.samplers.sgld import sgld
from atebm_jax.samplers.sign import sign

#: Samplers by name; their arguments, numbers with defaults, are their settings.
SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "pgd": pgd,
    "momentum": momentum,
    "adam": adam,
    "sgld": sgld,
    "sign": sign,
}


def sampler(text: str, **settings: float) -> Sampler:
    """A sampler as it is written: its name, with settings in parentheses if need be.

        sampler("pgd"), sampler("sgld(noise=0.005)"), sampler("sgld", noise=0.005)

    Args:
      text: a key of `SAMPLERS`, and settings by name that are not to be the defaults.
      settings: more of them.

    Raises:
      UserError: no such sampler or setting, one that is no number or out of its range.
    """
    name, given = _read(text, settings)
    return SAMPLERS[name](**given)


def resolved(text: str) -> str:
    """How a sampler is written with all of its settings: "sgld" as "sgld(noise=0.01)".

    Two texts of the same sampler become one, which protocols hold.

    Raises:
      UserError: as of `sampler`.
    """
    name, given = _read(text, {})
    SAMPLERS[name](**given)
    values = {key: float(value) for key, value in (_defaults(name) | given).items()}
    return _written(name, values)


def step_length(text: str, step_size: float) -> float:
    """L2 length of every step, pixels; infinite where gradients decide it."""
    return step_size if sampler(text).by_length else math.inf


def _defaults(name: str) -> dict[str, float]:
    parameters = inspect.signature(SAMPLERS[name]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters}


def _written(name: str, values: dict[str, float]) -> str:
    settings = ",".join(f"{key}={value!r}" for key, value in values.items())
    return f"{name}({settings})" if settings else name


def _read(text: str, more: dict[str, float]) -> tuple[str, dict[str, float]]:
    """The name and the settings that are given; their ranges are not looked at."""
    call = calls.read(text) if isinstance(text, str) else None
    name, words = call or ("", [])
    if name not in SAMPLERS:
        known = ", ".join(_written(name, _defaults(name)) for name in SAMPLERS)
        raise UserError(f"unknown sampler {text!r}: choose one of {known}.")
    pairs = [word.partition("=") for word in words]
    given: list[tuple[str, Any]] = [(k.strip(), _number(v)) for k, _, v in pairs]
    given += more.items()
    defaults = _defaults(name)
    for position, (key, value) in enumerate(given):
        problem = None
        if key not in defaults:
            problem = f"{name} has no setting {key!r}"
        elif key in dict(given[:position]):
            problem = f"{key} is given twice"
        elif isinstance(value, bool) or not isinstance(value, int | float | np.number):
            problem = f"{key} is {value!r}, which is no number"
        if problem:
            raise UserError(
                f"sampler {text!r}: {problem}; write {_written(name, defaults)}"
                + ", with numbers of your own" * bool(defaults)
                + "."
            )
    return name, dict(given)


def _number(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word.strip()
