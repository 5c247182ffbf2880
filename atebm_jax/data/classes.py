"""Classes as users name them: by their name or by their place."""

from collections.abc import Sequence

from atebm_jax.errors import UserError
from atebm_jax.names import of_class


def names_of(class_names: Sequence[str] | None, number: int) -> list[str]:
    """K names: the data set's own if it has K of them, else the numbers from 0."""
    if class_names is not None and len(class_names) == number:
        return list(class_names)
    return [str(place) for place in range(number)]


def find(
    flag: str, word: str, names: Sequence[str], also: str = ", with commas"
) -> int:
    """The place of the class that a word means.

    A name is preferred to a place ("10" may be the name of any class), and an exact
    name to one that differs in case. `name:10` and `place:10` say which is meant.

    Args:
      flag, also: where the word was given, and what else is taken there, for messages.
      word: a name, a place, or either after "name:" or "place:".
      names: of all classes.

    Raises:
      UserError: no such class, or more than one.
    """
    found = _meant(flag, of_class(word), names)
    if len(found) > 1:
        several = ", ".join(f"{names[place]!r} at place {place}" for place in found[:6])
        raise UserError(
            f"{flag}={word} may be {several}: give {flag}=place:{found[0]}, say."
        )
    if not found:
        raise UserError(
            f"{flag}={word}: expected numbers from 0 to {len(names) - 1} or names of "
            f"classes{also}."
        )
    return found[0]


def _meant(flag: str, word: str, names: Sequence[str]) -> list[int]:
    named, placed = _called(word, names), _at_place(word, names)
    kind, _, rest = word.partition(":")
    if not named and kind in ("name", "place"):
        return _called(rest, names) if kind == "name" else _at_place(rest, names)
    if named and placed and named != placed:
        raise UserError(
            f"{flag}={word} is the name of class {named[0]} and the place of class "
            f"{placed[0]}, whose name is {names[placed[0]]!r}: give {flag}=name:{word} "
            f"or {flag}=place:{word}."
        )
    folded = [name.casefold() for name in names]
    return named or placed or _called(word.casefold(), folded)


def check_keyword(flag: str, word: str, names: Sequence[str]) -> None:
    """Refuses a keyword of a flag with a `UserError` if a class has that name too."""
    if named := _called(word, names):
        raise UserError(
            f"{flag}={word} has a meaning of its own and is the name of class "
            f"{named[0]}: for the class give {flag}=name:{word}."
        )


def _called(word: str, names: Sequence[str]) -> list[int]:
    return [place for place, name in enumerate(names) if name == word]


def _at_place(word: str, names: Sequence[str]) -> list[int]:
    # No place has ten digits, and Python refuses to read numbers of thousands.
    is_place = word.isdecimal() and len(word) < 10 and int(word) < len(names)
    return [int(word)] if is_place else []
