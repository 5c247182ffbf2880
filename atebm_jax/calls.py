"""Choices that are written like calls: `resize(256,bicubic)`, `sgld(noise=0.005)`."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from atebm_jax.errors import UserError, check_choice

_CALL = re.compile(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*")


def read(text: str) -> tuple[str, list[str]] | None:
    """The name before the parentheses, and the words between commas inside of them.

    No words without parentheses, or with nothing in them; None if the text is written
    otherwise.
    """
    match = _CALL.fullmatch(text)
    if match is None:
        return None
    return match[1], [word.strip() for word in match[2].split(",")] if match[2] else []


def choice(
    kind: str, table: Mapping[str, Callable[..., Any]], text: str
) -> tuple[str, dict[str, float]]:
    """A function of a table, written with settings: "sgld(noise=0.005)".

    Args:
      kind: what the table holds, for messages.
      table: functions whose arguments, numbers with defaults, are the settings.
      text: the choice as the user writes it.

    Returns:
      (name, the given settings); their ranges are not checked.

    Raises:
      UserError: no such function or setting, one that is given twice or no number.
    """
    name, words = (read(text) if isinstance(text, str) else None) or ("", [])
    if name not in table:
        known = [_written(key, _defaults(table[key])) for key in table]
        check_choice(kind, text, known)
    defaults = _defaults(table[name])
    given: dict[str, float] = {}
    for key, value in map(_setting, words):
        if key not in defaults:
            problem = f"{name} has no setting {key!r}"
        elif key in given:
            problem = f"{key} is given twice"
        elif isinstance(value, str):
            problem = f"{key} is {value!r}, which is no number"
        else:
            given[key] = value
            continue
        own = ", with numbers of your own" if defaults else ""
        raise UserError(
            f"{kind} {text!r}: {problem}; write {_written(name, defaults)}{own}."
        )
    return name, given


def resolved(kind: str, table: Mapping[str, Callable[..., Any]], text: str) -> str:
    """A choice with all of its settings: "sgld" as "sgld(noise=0.01)".

    Args and errors as of `choice`.
    """
    name, given = choice(kind, table, text)
    settings = _defaults(table[name]) | given
    return _written(name, {key: float(value) for key, value in settings.items()})


def _defaults(function: Callable[..., Any]) -> dict[str, float]:
    return {k: p.default for k, p in inspect.signature(function).parameters.items()}


def _written(name: str, settings: Mapping[str, float]) -> str:
    inside = ",".join(f"{key}={value!r}" for key, value in settings.items())
    return f"{name}({inside})" if settings else name


def _setting(word: str) -> tuple[str, float | str]:
    key, _, value = map(str.strip, word.partition("="))
    try:
        return key, float(value)
    except ValueError:
        return key, value
