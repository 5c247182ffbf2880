"""Examples of a test, in the units that `conftest.py` sets."""

from hypothesis import settings


def budget(examples: int, quick: int | None = None) -> settings:
    """So many examples, times those of the profile; `quick` where that is one."""
    factor = settings().max_examples
    return settings(max_examples=quick if quick and factor == 1 else examples * factor)
