"""The one exception that means "the input is wrong", as opposed to "the code is"."""

import difflib
from collections.abc import Collection


class UserError(ValueError):
    """A mistake in a config, flag, path, image or checkpoint.

    The message says what is wrong, what was expected and what to do. Commands print it
    without a traceback and exit with code 2.
    """


def check_choice(
    field: str, value: object, choices: Collection[str], of: str = ""
) -> None:
    """Refuses a value of a field ("model.stem") that is none of a few.

    `of` says what the choices belong to, where that is in doubt: " of a ViT".
    """
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        meant = "".join(f" Did you mean {name!r}?" for name in near)
        known = ", ".join(choices)
        raise UserError(f"unknown {field} {value!r}{of}: choose one of {known}.{meant}")


def shortened(value: object) -> str:
    """A value for a sentence: of a thousand classes the first ones."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:160]} ..."
