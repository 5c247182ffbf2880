"""Reads the text of a compiled program: loops, collectives, kernels, estimated cycles.

The text is what `compiled.as_text()` returns for a CPU, GPU or TPU.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_REFERENCE = re.compile(
    r"(?:calls|to_apply|condition|body|branch_computations|called_computations)="
    r"\{?((?:%[\w.\-]+(?:, )?)+)\}?"
)
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|"
    r"collective-broadcast|ragged-all-to-all)(?:-start)?\("
)
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_RESULT = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_BITS = re.compile(r"\d+")
_UNTIL = re.compile(r"ROOT .* compare\(%[\w.\-]+, %([\w.\-]+)\), direction=LT")
# What runs on a GPU as kernels of its own; all else is bookkeeping.
_KERNELS = frozenset(
    {
        *("fusion", "custom-call", "copy", "dot", "convolution", "sort", "reduce"),
        *("scatter", "gather", "reduce-window", "select-and-scatter", "transpose"),
        "rng-bit-generator",
    }
)


class Collective(NamedTuple):
    """One communication: its kind, and elements and bytes of its largest result."""

    kind: str
    elements: int
    bytes: int = 0


class Loop(NamedTuple):
    """One `while`: the scope it was traced in, its turns if known, its body's name."""

    scope: str
    turns: int | None
    body: str


class _Instruction(NamedTuple):
    """An instruction taken apart."""

    line: str
    name: str
    made: str  #: the type of its result
    kind: str
    operands: list[str]  #: their names


class Program:
    """The computations of a compiled program by name."""

    def __init__(self, text: str):
        self._lines: dict[str, list[str]] = {}
        self._entry = ""
        name = ""
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                name = header[1]
                self._lines[name] = []
                if line.startswith("ENTRY"):
                    self._entry = name
            elif name:
                self._lines[name].append(line)

    def everything(self) -> list[str]:
        """The instructions of the whole program."""
        return [_code(line) for lines in self._lines.values() for line in lines]

    def loops(self, name: str = "") -> list[Loop]:
        """The loops that a computation (by default the main one) runs, in order."""
        found = []
        for line in self._lines[name or self._entry]:
            body = re.search(r"body=%([\w.\-]+)", line) if " while(" in line else None
            if body:
                scope = re.search(r'op_name="([^"]*)"', line)
                turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                count = int(turns[1]) if turns else self._counted(line)
                found.append(Loop(scope[1] if scope else "", count, body[1]))
        return found

    def _counted(self, line: str) -> int | None:
        """Turns of a loop that stops at a constant of its condition, if it does.

        A TPU's compiler does not write the turns beside the loop. It is taken to count
        from 0 by 1, as `jax.lax.fori_loop` does.
        """
        condition = re.search(r"condition=%([\w.\-]+)", line)
        text = "\n".join(self._lines.get(condition[1], [])) if condition else ""
        limit = _UNTIL.search(text)
        if limit is None:
            return None
        name = re.escape(limit[1])
        constant = re.search(rf"%{name} = s32\[\]\S* constant\((\d+)\)", text)
        return int(constant[1]) if constant else None

    def all_loops(self, name: str = "") -> list[Loop]:
        """The loops of a computation and those inside of them, outer ones first."""
        found = []
        for loop in self.loops(name):
            found += [loop, *self.all_loops(loop.body)]
        return found

    def total(
        self,
        cost: Callable[[str], float],
        turns: Mapping[str, int] | None = None,
        name: str = "",
    ) -> float:
        """What a computation costs with its loops, nested ones included.

        Args:
          cost: name of a computation -> what its own instructions cost.
          turns: body -> how often it runs; other loops run as often as the text says,
            or once where it does not.
          name: of the computation; by default the main one.
        """
        turns = turns or {}
        result = cost(name or self._entry)
        for loop in self.loops(name):
            if count := turns.get(loop.body, loop.turns or 1):
                result += count * self.total(cost, turns, loop.body)
        return result

    def own_cycles(self, name: str) -> int:
        """A TPU compiler's estimate of a computation without its loops."""
        return sum(
            int(found[1])
            for line in self._lines[name]
            if " while(" not in line
            and (found := re.search(r'"estimated_cycles":"(\d+)"', line))
        )

    def kernels(self, name: str) -> list[str]:
        """The instructions of a computation that a GPU launches kernels for."""
        found = _instructions(self._lines[name])
        return [one.line for one in found if one.kind in _KERNELS]

    def kernel_costs(self, name: str = "") -> Iterator[tuple[int, int]]:
        """(FLOPs, bytes) of each kernel: of its products, and read and written once."""
        found = _instructions(self._lines[name or self._entry])
        types = {one.name: one.made for one in found}
        for one in found:
            if one.kind in _KERNELS:
                read = sum(_bytes(types.get(o, "")) for o in set(one.operands))
                yield self._flops(one, types), _bytes(one.made) + read

    def _flops(self, kernel: _Instruction, types: Mapping[str, str]) -> int:
        """Of convolutions and products, those inside a fusion included."""
        called = [self._lines.get(name, []) for name in _called(kernel.line)]
        inner = _instructions(itertools.chain(*called))
        types = {**types, **{one.name: one.made for one in inner}}
        return sum(_product_flops(one, types) for one in [kernel, *inner])

    def reachable(self, start: str) -> list[str]:
        """The instructions of a computation and of all that it calls."""
        seen: dict[str, None] = {}
        waiting = [start]
        while waiting:
            name = waiting.pop()
            if name in seen or name not in self._lines:
                continue
            seen[name] = None
            for line in self._lines[name]:
                waiting += _called(line)
        return [_code(line) for name in seen for line in self._lines[name]]


def collectives(lines: Iterable[str]) -> list[Collective]:
    """The communications among some instructions."""
    found = [match for line in lines if (match := _COLLECTIVE.search(line))]
    return [
        Collective(match[2], max(map(math.prod, _sizes(match[1]))), _bytes(match[1]))
        for match in found
    ]


def _code(line: str) -> str:
    """Without metadata, which names Python functions and could be taken for code."""
    return line.partition(", metadata=")[0]


def _called(line: str) -> list[str]:
    """Names of the computations that an instruction runs."""
    return _NAME.findall(" ".join(_REFERENCE.findall(line)))


def _instructions(lines: Iterable[str]) -> list[_Instruction]:
    found = []
    for line in lines:
        if match := _RESULT.match(line):
            # Behind the operands stand attributes, which name computations.
            operands = _NAME.findall(line[match.end() :].partition("), ")[0])
            found.append(_Instruction(line, match[1], match[2], match[3], operands))
    return found


def _sizes(text: str) -> list[tuple[int, ...]]:
    return [
        tuple(int(n) for n in sizes.split(",") if n)
        for _, sizes in _SHAPE.findall(text)
    ]


def _bytes(text: str) -> int:
    """Bytes of all arrays of a result's type."""
    total = 0
    for kind, sizes in _SHAPE.findall(text):
        bits = _BITS.search(kind)
        width = 1 if kind == "pred" or bits is None else max(int(bits[0]) // 8, 1)
        total += width * math.prod(int(n) for n in sizes.split(",") if n)
    return total


def _product_flops(one: _Instruction, types: Mapping[str, str]) -> int:
    """FLOPs of one convolution or product; 0 for any other instruction."""
    if one.kind != "dot" and "dim_labels=" not in one.line:
        return 0
    made = _sizes(one.made)[:1]
    left, right = (_sizes(types.get(o, ""))[:1] for o in one.operands[:2])
    if one.kind == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", one.line)
        if contracted is None or not left:
            return 0
        dims = (left[0][int(n)] for n in contracted[1].split(","))
        return 2 * math.prod(made[0]) * math.prod(dims)
    # As of the forward pass, whose image, kernel and result a backward pass has in
    # other places; beside the result, the first, stands what cuDNN works in.
    kernel, wide = right, made
    if "BackwardInput" in one.line:
        wide = left
    elif "BackwardFilter" in one.line:
        kernel, wide = made, right
    labels = re.search(r"dim_labels=\w+_(\w+)->", one.line)
    if not kernel or not wide or labels is None:
        return 0
    outputs = kernel[0][labels[1].index("o")]
    return 2 * math.prod(wide[0]) * math.prod(kernel[0]) // max(outputs, 1)
