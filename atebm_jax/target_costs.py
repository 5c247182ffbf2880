"""What a program compiled for a machine that is not here takes: time, communication.

Nothing is measured. The time is an estimate: on a TPU the compiler's own, of the cycles
of every instruction; on a GPU, whose compiler makes none, the time that each kernel's
FLOPs and bytes take at the peaks of the card, without launches and communication.
"""

import functools
from collections.abc import Callable, Iterator, Mapping

import ml_collections

from atebm_jax import hlo
from atebm_jax.stages import STAGES
from atebm_jax.targets import Target

# The scope of the loop over the parts of a batch, as traced.
_PARTS = "parts"


def peak(target: Target, dtype: str) -> float:
    """FLOP/s of a device; products of float32 run on a GPU as TF32, at half of them."""
    halved = target.is_gpu and dtype == "float32"
    return target.chip.flops / (2 if halved else 1)


def estimate(
    program: hlo.Program, target: Target, dtype: str
) -> Callable[[str], float]:
    """Name of a computation -> seconds of its own instructions, worked out once."""
    chip, flops = target.chip, peak(target, dtype)

    @functools.cache
    def of(name: str) -> float:
        if not target.is_gpu:
            return program.own_cycles(name) * chip.flops_per_cycle / chip.flops
        costs = program.kernel_costs(name)
        return sum(max(f / flops, b / chip.bandwidth) for f, b in costs)

    return of


def climbs_of(config: ml_collections.ConfigDict, name: str) -> dict[str, str]:
    """The parts of a stage that climb, and the scopes of their loops."""
    parts = STAGES[name].parts(config[name])
    return {part: declared.scope for part, declared in parts.items() if declared.scope}


def _part(loop: hlo.Loop, climbs: Mapping[str, str]) -> str:
    """Which of a step's loops this is; "" for sorts, searches and the like."""
    if loop.scope.endswith(f"{_PARTS}/while"):
        return _PARTS
    # The longest scope first: others may be its end.
    for part, scope in sorted(climbs.items(), key=lambda item: -len(item[1])):
        if f"/{scope}/while/" in f"/{loop.scope}/":
            return part
    return ""


def _loops(
    program: hlo.Program, climbs: Mapping[str, str], name: str = ""
) -> Iterator[tuple[str, hlo.Loop]]:
    """The loops of a batch's parts and of PGD; of one climb's nest only the outermost.

    A sampler climbs in a loop of one turn around the loop of steps, where the compiler
    has not removed it; what a step itself searches for stands further inside.
    """
    for loop in program.loops(name):
        part = _part(loop, climbs)
        if part:
            yield part, loop
        if part not in climbs:
            yield from _loops(program, climbs, loop.body)


def times(
    program: hlo.Program,
    target: Target,
    climbs: Mapping[str, str],
    *,
    parts: int,
    dtype: str = "bfloat16",
) -> dict[str, float]:
    """Seconds of a step's parts.

    Args:
      program, target: a compiled step, and what it was compiled for.
      climbs: as of `climbs_of`.
      parts, dtype: micro-batches, and the network's dtype.

    Returns:
      Each of the climbs that has a loop (one step, of the whole batch), and "rest".
    """
    own_seconds = estimate(program, target, dtype)
    loops = list(_loops(program, climbs))

    def taking(climbed: str) -> float:
        bodies = {
            loop.body: parts if part == _PARTS else int(part == climbed)
            for part, loop in loops
        }
        return program.total(own_seconds, bodies)

    rest = taking("")
    there = {part for part, _ in loops}
    result = {part: taking(part) - rest for part in climbs if part in there}
    return result | {"rest": rest}


def whole(seconds: Mapping[str, float], turns: Mapping[str, int]) -> float:
    """Seconds of a whole step, of those of its `times` and of how often each part runs.

    What runs without a loop of its own is in the rest.
    """
    climbs = (turns[part] * x for part, x in seconds.items() if part != "rest")
    return seconds["rest"] + sum(climbs)


def communication(
    program: hlo.Program, climbs: Mapping[str, str]
) -> dict[str, dict[str, dict[str, int]]]:
    """Collectives by place and kind: how many, and the bytes of their results."""
    loops = program.all_loops()
    inner = [loop for part, loop in _loops(program, climbs) if part in climbs]
    in_pgd = {line for loop in inner for line in program.reachable(loop.body)}
    in_loops = {line for loop in loops for line in program.reachable(loop.body)}
    places = {
        "in the loops of PGD": in_pgd,
        "in other loops": in_loops - in_pgd,
        "outside of loops": set(program.everything()) - in_loops,
    }
    result: dict[str, dict[str, dict[str, int]]] = {}
    for place, lines in places.items():
        found: dict[str, dict[str, int]] = {}
        for made in hlo.collectives(sorted(lines)):
            entry = found.setdefault(made.kind, {"number": 0, "bytes": 0})
            entry["number"] += 1
            entry["bytes"] += made.bytes
        result[place] = found
    return result
