"""Choices that are written like calls: `resize(256,bicubic)`, `sgld(noise=0.005)`."""

import re

_CALL = re.compile(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*")


def read(text: str) -> tuple[str, list[str]] | None:
    """What stands before the parentheses, and the words with commas inside of them.

    Returns:
      (name, words), no words where there are no parentheses or nothing in them; None
      where the text is written otherwise.
    """
    match = _CALL.fullmatch(text)
    if match is None:
        return None
    return match[1], [word.strip() for word in match[2].split(",")] if match[2] else []
