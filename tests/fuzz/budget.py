"""Examples of a test, in the units that `conftest.py` sets."""

from hypothesis import settings


def budget(examples: int) -> settings:
    """So many examples, times those of the profile."""
    return settings(max_examples=examples * settings().max_examples)
