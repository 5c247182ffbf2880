"""Reads pickles as data: a stack machine that imports nothing and calls nothing.

Python's own `pickle` runs whatever a file asks for. Here the opcodes only build plain
containers; a name in a pickle stays a `Named`, and a call on it runs the function of
ours that `CALLS` lists under that name: that short list is all that a file can call.
"""

import math
import pickletools
import re
import sys
from collections.abc import Callable, Sized
from typing import Any, BinaryIO

import numpy as np

from atebm_jax.convert.values import (
    Damaged,
    Inert,
    Named,
    Refused,
    Tensor,
    describe,
    dtype_named,
    key,
    make_tensor,
    whole,
)

# Gives the object that a persistent id in a pickle stands for.
PersistentFn = Callable[[Any], Any]

_MARK = object()

# No checkpoint has more objects: a larger file was made to exhaust memory.
_MOST_OPERATIONS = 20_000_000


def load(file: BinaryIO, persistent: PersistentFn | None = None) -> Any:
    """Reads one pickle from the position of a file, which is behind it afterwards.

    Gives plain containers, numbers and strings, and the types of `values`.
    `persistent` resolves persistent ids; without it they are refused.

    Raises:
      Refused: the pickle calls or builds what is not in `CALLS`.
      Damaged: it is no pickle, or breaks off.
    """
    machine = _Machine(persistent)
    try:
        for count, (opcode, argument, place) in enumerate(pickletools.genops(file)):
            if count > _MOST_OPERATIONS or machine.copied > 64 * (place or 0) + 2**24:
                raise Damaged("more objects than any checkpoint has")
            if opcode.name not in _METHODS:
                raise Refused(f"opcode {opcode.name}")
            _METHODS[opcode.name](machine, argument)
        if len(machine.stack) != 1:
            raise Damaged("a pickle that leaves no single value")
        return machine.pop()
    except (Refused, Damaged):
        raise
    except Exception as error:
        # Random bytes make the machine fail in many ways; all mean the same.
        raise Damaged(f"{type(error).__name__} in a pickle") from error


class _Machine:
    """The pickle machine: a stack, a memo, and a method for each kind of opcode."""

    def __init__(self, persistent: PersistentFn | None):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self._persistent = persistent
        # Elements given to calls, which copy them (not arrays): a short file can ask
        # for many copies of one long text.
        self.copied = 0

    def top(self) -> Any:
        if self.stack[-1] is _MARK:
            raise Damaged("a mark where a value was expected")
        return self.stack[-1]

    def pop(self) -> Any:
        value = self.top()
        self.stack.pop()
        return value

    def pop_to_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def pop_many(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.top()

    def set_items(self, pairs: list[Any]) -> None:
        target = self.top()
        target = target.items if isinstance(target, Inert) else target
        if isinstance(target, dict):
            target.update(_paired(pairs))
        else:
            raise Refused(f"items for {describe(target)}")

    def append_all(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(map(key, values))
        elif not isinstance(target, Inert):
            raise Refused(f"elements for {describe(target)}")

    def name_on_stack(self, _: Any) -> None:
        module, name = self.pop_many(2)
        if not isinstance(name, str) or not isinstance(module, str):
            raise Damaged("a name that is no text")
        self.push(_named(module, name))

    def call(self, function: Any, arguments: Any) -> None:
        if isinstance(arguments, tuple):
            copied = (x for x in arguments if not isinstance(x, np.ndarray))
            self.copied += sum(len(x) for x in copied if isinstance(x, Sized))
        self.push(_call(function, arguments))

    def call_marked(self, _: Any) -> None:
        function, *arguments = self.pop_to_mark()
        self.call(function, tuple(arguments))

    def new_object(self, kind: Any, arguments: Any, keywords: Any = None) -> None:
        made = _instance(kind, arguments)
        if isinstance(made, Inert) and keywords:
            made.state = keywords
        self.push(made)

    def build(self, _: Any) -> None:
        """Keeps a state as data; no code of the file's classes runs."""
        state, target = self.pop(), self.top()
        if isinstance(target, Inert):
            target.state = state
        elif isinstance(target, np.ndarray):
            _fill_array(target, state)
        elif isinstance(target, Named) or callable(target):
            raise Refused(f"a new state for {describe(target)}")
        # Attributes of a dictionary or tensor (`_metadata`, hooks) are not weights.

    def persistent(self, name: Any) -> None:
        if self._persistent is None:
            raise Refused(f"an object from outside the file ({describe(name)})")
        self.push(self._persistent(name))


# Modules that have other names in older versions of Python, NumPy and dill.
_RENAMED = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "numpy.core.multiarray": "numpy._core.multiarray",
    "numpy.core.numeric": "numpy._core.numeric",
    "dill.dill": "dill._dill",
}


def _named(module: str, name: str) -> Named:
    return Named(_RENAMED.get(module, module), name)


def _paired(pairs: list[Any]) -> dict:
    return dict(zip(map(key, pairs[::2]), pairs[1::2], strict=True))


_VALUES = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
# What each opcode does with the machine and its argument.
_METHODS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    **dict.fromkeys(_VALUES, _Machine.push),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "MARK": lambda m, _: m.push(_MARK),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.pop_to_mark(),
    "DUP": lambda m, _: m.push(m.top()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, i: m.push(m.memo[i])),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, _: m.push(tuple(m.pop_many(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.pop_many(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.pop_many(3))),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "LIST": lambda m, _: m.push(m.pop_to_mark()),
    "APPEND": lambda m, _: m.append_all([m.pop()]),
    "APPENDS": lambda m, _: m.append_all(m.pop_to_mark()),
    "EMPTY_SET": lambda m, _: m.push(set()),
    "FROZENSET": lambda m, _: m.push(frozenset(map(key, m.pop_to_mark()))),
    "ADDITEMS": lambda m, _: m.append_all(m.pop_to_mark()),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "DICT": lambda m, _: m.push(_paired(m.pop_to_mark())),
    "SETITEM": lambda m, _: m.set_items(m.pop_many(2)),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    "GLOBAL": lambda m, name: m.push(_named(*name.split(" ", 1))),
    "STACK_GLOBAL": _Machine.name_on_stack,
    "REDUCE": lambda m, _: m.call(*m.pop_many(2)),
    "INST": lambda m, name: m.call(_named(*name.split(" ", 1)), tuple(m.pop_to_mark())),
    "OBJ": _Machine.call_marked,
    "NEWOBJ": lambda m, _: m.new_object(*m.pop_many(2)),
    "NEWOBJ_EX": lambda m, _: m.new_object(*m.pop_many(3)),
    "BUILD": _Machine.build,
    "PERSID": _Machine.persistent,
    "BINPERSID": lambda m, _: m.persistent(m.pop()),
}


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    return make_tensor(storage, offset, shape, strides)


def _tensor_v3(storage: Any, *arguments: Any) -> Tensor:
    # `requires_grad` and the hooks come before the dtype.
    offset, shape, strides, _, _, dtype = arguments[:6]
    return make_tensor(storage, offset, shape, strides, dtype_named(dtype))


def _mapping(pairs: Any = (), *_: Any) -> dict:
    if isinstance(pairs, dict):
        return dict(pairs)
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        raise Damaged("a dictionary of something else than pairs")
    return {key(name): value for name, value in pairs}


def _sequence(kind: Callable, entry: Callable = lambda value: value) -> Callable:
    def build(values: Any = (), *_: Any) -> Any:
        if not isinstance(values, list | tuple | set | frozenset):
            # An argument such as 10**12 would take memory that the file does not have.
            raise Refused(f"{kind.__name__}({describe(values)})")
        return kind(map(entry, values))

    return build


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "ascii", "utf-8"):
        raise Refused(f"_codecs.encode with {describe(encoding)}")
    return text.encode(encoding)


def _array(kind: Any, *_: Any) -> np.ndarray:
    if kind != Named("numpy", "ndarray"):
        raise Refused(f"an array of class {describe(kind)}")
    return np.empty(0)


_CODE = re.compile(r"[biuf](1|2|4|8)|c(8|16)|\?|V2|bfloat16")


def _numpy_type(code: Any, *_: Any) -> Inert:
    if not isinstance(code, str) or not _CODE.fullmatch(code.lstrip("<>|=")):
        raise Refused(f"numpy.dtype({describe(code)})")
    return Inert("numpy.dtype", (code.lstrip("<>|="),))


def _numbers(kind: Any, data: Any, count: int) -> np.ndarray:
    """[count] numbers of a type from bytes, which old protocols hold as text."""
    data = data.encode("latin1") if isinstance(data, str) else data
    known = isinstance(kind, Inert) and kind.kind == "numpy.dtype"
    if not known or not isinstance(data, bytes | bytearray):
        raise Refused("NumPy numbers that are objects")
    # The state of a type begins with a version and the order of the bytes.
    order = ">" if kind.state and kind.state[1] == ">" else "<"
    dtype = np.dtype(kind.arguments[0]).newbyteorder(order)
    if count * dtype.itemsize != len(data):
        raise Damaged(f"{count} NumPy numbers in {len(data)} bytes")
    return np.frombuffer(data, dtype)


def _fill_array(target: Any, state: Any) -> None:
    """Checks the state of an array (shape, type, bytes), and sets it."""
    if not isinstance(state, tuple) or len(state) != 5:
        raise Damaged("an array without a state")
    _, shape, kind, fortran, data = state
    sizes = tuple(map(whole, shape))
    numbers = _numbers(kind, data, math.prod(sizes))
    target.__setstate__((1, sizes, numbers.dtype, bool(fortran), numbers.tobytes()))


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any = "C") -> np.ndarray:
    """An array as protocol 5 writes it."""
    kind = _numpy_type(kind) if isinstance(kind, str) else kind
    target = np.empty(0)
    _fill_array(target, (1, shape, kind, order == "F", data))
    return target


def _inert(kind: str) -> Callable:
    return lambda *arguments: Inert(kind, arguments)


# Classes of plain data, by module: their arguments are kept.
_DATA = {
    "argparse": ("Namespace",),
    "builtins": ("object",),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "pathlib": ("PosixPath", "PurePath", "PurePosixPath", "WindowsPath"),
    "torch": ("Tensor", "device"),
    "torch.serialization": ("_get_layout",),
    "types": ("SimpleNamespace",),
    # How dill writes the functions and classes in some training states (a schedule's
    # lambda). They remain descriptions: no code and no class is made of them.
    "dill._dill": (
        *("_create_cell", "_create_code", "_create_function", "_create_type"),
        *("_get_attr", "_import_module", "_load_type"),
    ),
}

# All that a pickle can call, by its name in the pickle.
CALLS: dict[str, Callable[..., Any]] = {
    "builtins.set": _sequence(set, key),
    "builtins.frozenset": _sequence(frozenset, key),
    "builtins.list": _sequence(list),
    "builtins.tuple": _sequence(tuple),
    "builtins.dict": _mapping,
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": lambda _=None, *items: _mapping(*items),
    "torch.Size": _sequence(tuple),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    # A subclass of a tensor (with class and state) becomes a plain tensor.
    "torch._tensor._rebuild_from_type_v2": lambda function, _, arguments, __: _call(
        function, arguments
    ),
    "_codecs.encode": _encode,
    "numpy.dtype": _numpy_type,
    "numpy._core.multiarray._reconstruct": _array,
    "numpy._core.multiarray.scalar": lambda kind, data: _numbers(kind, data, 1)[0],
    "numpy._core.numeric._frombuffer": _from_buffer,
    # An instance in old protocols: (class, object, None).
    "copyreg._reconstructor": lambda kind, *_: _instance(kind, ()),
    **{
        f"{module}.{name}": _inert(f"{module}.{name}")
        for module, names in _DATA.items()
        for name in names
    },
}


def _call(function: Any, arguments: Any) -> Any:
    """The result of a call in a pickle; `Refused` unless `CALLS` has it."""
    listed = isinstance(function, Named) and str(function) in CALLS
    if not listed or not isinstance(arguments, tuple):
        raise Refused(f"a call of {describe(function)}")
    try:
        return CALLS[str(function)](*arguments)
    except (TypeError, ValueError, OverflowError) as error:
        raise Damaged(f"{function} with other arguments than it takes") from error


def _instance(kind: Any, arguments: Any) -> Any:
    """An instance as plain data or `Inert`: no constructor runs."""
    if not isinstance(kind, Named) or not isinstance(arguments, tuple):
        raise Refused(f"an instance of {describe(kind)}")
    if str(kind) in CALLS:
        return _call(kind, arguments)
    # Python's own modules have classes that run programs.
    if kind.module.partition(".")[0] in sys.stdlib_module_names:
        raise Refused(f"an instance of {kind}")
    return Inert(str(kind), arguments)
