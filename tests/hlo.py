"""Reads the text of a compiled program: loop bodies, convolutions, collectives."""

import math
import re
from typing import Any, NamedTuple

import jax

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_REFERENCE = re.compile(
    r"(?:calls|to_apply|condition|body|branch_computations|called_computations)="
    r"\{?((?:%[\w.\-]+(?:, )?)+)\}?"
)
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|"
    r"collective-broadcast|ragged-all-to-all)(?:-start)?\("
)
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def compiled(lowered: Any) -> Any:
    """Compiles as users do: tests have most of the optimisations turned off."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, False)
    try:
        return lowered.compile()
    finally:
        jax.config.update(name, before)


class Collective(NamedTuple):
    """One communication: its kind and the elements of its largest result."""

    kind: str
    elements: int


class Program:
    """The computations of a compiled program by name."""

    def __init__(self, text: str):
        self._lines: dict[str, list[str]] = {}
        # Inputs whose memory an output takes over.
        self.num_aliases = text.partition("\n")[0].count("-alias)")
        name = ""
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                name = header[1]
                self._lines[name] = []
            elif name:
                # Metadata names Python functions: it could be taken for code.
                self._lines[name].append(line.partition(", metadata=")[0])

    def everything(self) -> list[str]:
        """The instructions of the whole program."""
        return [line for lines in self._lines.values() for line in lines]

    def loop_bodies(self) -> list[list[str]]:
        """The instructions of every loop body with all that it calls."""
        bodies = [
            match[1]
            for line in self.everything()
            if " while(" in line and (match := re.search(r"body=%([\w.\-]+)", line))
        ]
        return [self._reachable(body) for body in bodies]

    def outside_loops(self) -> list[str]:
        """All instructions that are in no loop body."""
        inside = {line for body in self.loop_bodies() for line in body}
        return [line for line in self.everything() if line not in inside]

    def _reachable(self, start: str) -> list[str]:
        seen: dict[str, None] = {}
        waiting = [start]
        while waiting:
            name = waiting.pop()
            if name in seen or name not in self._lines:
                continue
            seen[name] = None
            for line in self._lines[name]:
                for names in _REFERENCE.findall(line):
                    waiting += re.findall(r"%([\w.\-]+)", names)
        return [line for name in seen for line in self._lines[name]]


def convolutions(lines: list[str]) -> list[tuple[int, ...]]:
    """The result shapes of the convolutions among some instructions."""
    return [
        _sizes(line.partition(" convolution(")[0])[-1]
        for line in lines
        if " convolution(" in line
    ]


def collectives(lines: list[str]) -> list[Collective]:
    """The communications among some instructions."""
    found = [match for line in lines if (match := _COLLECTIVE.search(line))]
    return [
        Collective(match[2], max(math.prod(s) for s in _sizes(match[1])))
        for match in found
    ]


def _sizes(text: str) -> list[tuple[int, ...]]:
    return [
        tuple(int(n) for n in sizes.split(",") if n) for sizes in _SHAPE.findall(text)
    ]
