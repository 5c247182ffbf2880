"""How many examples the fuzzing takes: few and always the same ones, or many.

    python -m pytest tests/fuzz -n 0 --hypothesis-profile=long

A test that says `budget(10)` takes ten examples by default, as in CI, and twenty
times as many in the long profile, where each run draws others.
"""

from hypothesis import HealthCheck, Phase, settings

# No shrinking: an example takes seconds, and prints as it is.
_COMMON = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.explicit, Phase.reuse, Phase.generate),
}

settings.register_profile(
    "quick", max_examples=1, derandomize=True, database=None, **_COMMON
)
settings.register_profile("long", max_examples=20, print_blob=True, **_COMMON)
settings.load_profile("quick")
