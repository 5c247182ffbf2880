"""Choices that are written like calls: `resize(256,bicubic)`, `sgld(noise=0.005)`."""

import inspect
import re
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from atebm_jax.errors import UserError, check_choice

_CALL = re.compile(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*")


def read(text: str) -> tuple[str, list[str]] | None:
    """The name before the parentheses, and the words between commas inside of them.

    Returns:
      (name, words), without words if there are no parentheses or nothing in them; None
      if the text is written otherwise.
    """
    match = _CALL.fullmatch(text)
    if match is None:
        return None
    return match[1], [word.strip() for word in match[2].split(",")] if match[2] else []


def choice(
    kind: str,
    table: Mapping[str, Callable[..., Any]],
    text: str,
    more: Mapping[str, float] | None = None,
) -> tuple[str, dict[str, float]]:
    """A function of a table, written with settings: "sgld(noise=0.005)".

    Args:
      kind: what the table holds, for messages.
      table: functions by name; their arguments, numbers with defaults, are the
        settings.
      text: the choice as the user writes it.
      more: settings that are not in the text.

    Returns:
      (name, the given settings); their ranges are not checked.

    Raises:
      UserError: no such function or setting, one that is given twice or no number.
    """
    call = read(text) if isinstance(text, str) else None
    name, words = call or ("", [])
    if name not in table:
        known = [_written(key, _defaults(table[key])) for key in table]
        check_choice(kind, text, known)
    pairs = [word.partition("=") for word in words]
    given: list[tuple[str, Any]] = [(k.strip(), _number(v)) for k, _, v in pairs]
    given += (more or {}).items()
    known_settings = _defaults(table[name])
    for position, (key, value) in enumerate(given):
        problem = None
        if key not in known_settings:
            problem = f"{name} has no setting {key!r}"
        elif key in dict(given[:position]):
            problem = f"{key} is given twice"
        elif isinstance(value, bool) or not isinstance(value, Real):
            problem = f"{key} is {value!r}, which is no number"
        if problem:
            raise UserError(
                f"{kind} {text!r}: {problem}; write {_written(name, known_settings)}"
                + ", with numbers of your own" * bool(known_settings)
                + "."
            )
    return name, dict(given)


def resolved(kind: str, table: Mapping[str, Callable[..., Any]], text: str) -> str:
    """A choice with all of its settings: "sgld" as "sgld(noise=0.01)".

    Args and errors as of `choice`.
    """
    name, given = choice(kind, table, text)
    settings = _defaults(table[name]) | given
    return _written(name, {key: float(value) for key, value in settings.items()})


def _defaults(function: Callable[..., Any]) -> dict[str, float]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters}


def _written(name: str, settings: Mapping[str, float]) -> str:
    inside = ",".join(f"{key}={value!r}" for key, value in settings.items())
    return f"{name}({inside})" if settings else name


def _number(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word.strip()
