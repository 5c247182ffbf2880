"""Reads pickles as data: a stack machine that imports nothing and calls nothing.

Python's own `pickle` runs whatever a file asks for. Here the opcodes only build plain
containers; names stay names, and calls go to the short list in `calls.CALLS`.
"""

import pickletools
from collections.abc import Callable, Sized
from typing import Any, BinaryIO

from atebm_jax.convert.calls import call, fill_array, instance
from atebm_jax.convert.values import (
    Damaged,
    Inert,
    Named,
    NumpyArray,
    NumpyType,
    Refused,
    describe,
    key,
)

# Turns what a pickle says instead of an object's data into that object.
PersistentFn = Callable[[Any], Any]

_MARK = object()

# More objects than any checkpoint has: a larger file was made to exhaust memory.
_MOST_OPERATIONS = 20_000_000


def load(file: BinaryIO, persistent: PersistentFn | None = None) -> Any:
    """Reads one pickle from where a file stands, and leaves it standing behind it.

    Args:
      file: readable and seekable.
      persistent: called on persistent ids; None refuses them.

    Returns:
      Plain containers, numbers and strings, and the types of `values`.

    Raises:
      Refused: the pickle calls or builds what is not on the list.
      Damaged: it is no pickle, or breaks off.
    """
    machine = _Machine(persistent)
    try:
        for count, (opcode, argument, place) in enumerate(pickletools.genops(file)):
            if count > _MOST_OPERATIONS or machine.copied > 64 * (place or 0) + 2**24:
                raise Damaged("more objects than any checkpoint has")
            machine.step(opcode.name, argument)
        return machine.result()
    except (Refused, Damaged):
        raise
    except Exception as error:
        # A stack machine fed with noise fails in many ways, all of them this one.
        raise Damaged(f"{type(error).__name__} in a pickle") from error


class _Machine:
    """The pickle machine: a stack, a memo, and one method a kind of opcode."""

    def __init__(self, persistent: PersistentFn | None):
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._persistent = persistent
        # Elements given to calls, which copy them: a short file may ask for many
        # copies of one long text.
        self.copied = 0

    def result(self) -> Any:
        if len(self._stack) != 1 or self._stack[0] is _MARK:
            raise Damaged("a pickle that leaves no single value")
        return self._stack[0]

    def step(self, name: str, argument: Any) -> None:
        if name in _IGNORED:
            return
        if name in _LITERALS:
            self._stack.append(_LITERALS[name])
        elif name in _VALUES:
            self._stack.append(argument)
        elif name in _EMPTY:
            self._stack.append(_EMPTY[name]())
        elif name in _METHODS:
            _METHODS[name](self, argument)
        else:
            raise Refused(f"opcode {name}")

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise Damaged("a mark where a value was expected")
        return value

    def top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise Damaged("a mark where a value was expected")
        return self._stack[-1]

    def pop_to_mark(self) -> list[Any]:
        position = len(self._stack) - 1
        while self._stack[position] is not _MARK:
            position -= 1
            if position < 0:
                raise Damaged("no mark")
        values = self._stack[position + 1 :]
        del self._stack[position:]
        return values

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def put(self, index: Any) -> None:
        self._memo[len(self._memo) if index is None else index] = self.top()

    def get(self, index: int) -> None:
        self.push(self._memo[index])

    def discard(self, _: Any) -> None:
        self._stack.pop()

    def discard_to_mark(self, _: Any) -> None:
        self.pop_to_mark()

    def build_tuple(self, size: int | None) -> None:
        if size is None:
            self.push(tuple(self.pop_to_mark()))
        else:
            self.push(tuple([self.pop() for _ in range(size)][::-1]))

    def set_items(self, pairs: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Inert):
            target.items.extend(zip(pairs[::2], pairs[1::2], strict=True))
        elif isinstance(target, dict):
            for name, value in zip(pairs[::2], pairs[1::2], strict=True):
                target[key(name)] = value
        else:
            raise Refused(f"items for {describe(target)}")

    def append_all(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Inert):
            target.items.extend(values)
        elif isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(map(key, values))
        else:
            raise Refused(f"elements for {describe(target)}")

    def name_on_stack(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Damaged("a name that is no text")
        self.push(Named(module, name))

    def reduce(self, _: Any) -> None:
        arguments = self.pop()
        self.push(self._call(self.pop(), arguments))

    def _call(self, function: Any, arguments: Any) -> Any:
        if isinstance(arguments, tuple):
            self.copied += sum(len(x) for x in arguments if isinstance(x, Sized))
        return call(function, arguments)

    def new_object(self, with_keywords: bool) -> None:
        keywords = self.pop() if with_keywords else {}
        arguments = self.pop()
        made = instance(self.pop(), arguments)
        if isinstance(made, Inert) and keywords:
            made.state = keywords
        self.push(made)

    def build(self, _: Any) -> None:
        """Keeps a state as data; no `__setstate__` exists that could run."""
        state, target = self.pop(), self.top()
        if isinstance(target, Inert):
            target.state = state
        elif isinstance(target, NumpyArray):
            fill_array(target, state)
        elif isinstance(target, NumpyType):
            target.order = "<" if state[1] not in ("<", ">", "|", "=") else state[1]
        elif isinstance(target, Named) or callable(target):
            raise Refused(f"a new state for {describe(target)}")
        # Attributes of a dictionary or a tensor (`_metadata`, hooks) are no weights.

    def persistent(self, name: Any) -> None:
        if self._persistent is None:
            raise Refused(f"an object from outside the file ({describe(name)})")
        self.push(self._persistent(name))

    def call_marked(self, function: Named | None) -> None:
        values = self.pop_to_mark()
        if function is None:
            function, *values = values
        self.push(self._call(function, tuple(values)))


def _named(argument: str) -> Named:
    module, _, name = argument.partition(" ")
    return Named(module, name)


_IGNORED = {"PROTO", "FRAME", "STOP"}
_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK}
_EMPTY = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": set,
    "EMPTY_TUPLE": tuple,
}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_METHODS: dict[str, Callable[[_Machine, Any], None]] = {
    "POP": _Machine.discard,
    "POP_MARK": _Machine.discard_to_mark,
    "DUP": lambda m, _: m.push(m.top()),
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.put,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": lambda m, _: m.build_tuple(None),
    "TUPLE1": lambda m, _: m.build_tuple(1),
    "TUPLE2": lambda m, _: m.build_tuple(2),
    "TUPLE3": lambda m, _: m.build_tuple(3),
    "LIST": lambda m, _: m.push(m.pop_to_mark()),
    "DICT": lambda m, _: _dictionary(m, m.pop_to_mark()),
    "FROZENSET": lambda m, _: m.push(frozenset(map(key, m.pop_to_mark()))),
    "SETITEM": lambda m, _: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    "APPEND": lambda m, _: m.append_all([m.pop()]),
    "APPENDS": lambda m, _: m.append_all(m.pop_to_mark()),
    "ADDITEMS": lambda m, _: m.append_all(m.pop_to_mark()),
    "GLOBAL": lambda m, argument: m.push(_named(argument)),
    "STACK_GLOBAL": _Machine.name_on_stack,
    "REDUCE": _Machine.reduce,
    "INST": lambda m, argument: m.call_marked(_named(argument)),
    "OBJ": lambda m, _: m.call_marked(None),
    "NEWOBJ": lambda m, _: m.new_object(False),
    "NEWOBJ_EX": lambda m, _: m.new_object(True),
    "BUILD": _Machine.build,
    "PERSID": _Machine.persistent,
    "BINPERSID": lambda m, _: m.persistent(m.pop()),
}


def _dictionary(machine: _Machine, pairs: list[Any]) -> None:
    machine.push({})
    machine.set_items(pairs)
