"""Reads pickles as data: a stack machine that imports nothing and calls nothing.

Python's own `pickle` runs whatever a file asks for. Here the opcodes only build plain
containers; a name in a pickle stays a `Named`, and a call on it runs the function of
ours that `CALLS` lists under that name: that short list is all that a file can call.
"""

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
    NumpyArray,
    NumpyType,
    Refused,
    Storage,
    Tensor,
    describe,
    dtype_named,
    key,
    make_tensor,
    whole,
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
        return _call_listed(function, arguments)

    def new_object(self, with_keywords: bool) -> None:
        keywords = self.pop() if with_keywords else {}
        arguments = self.pop()
        made = _instance(self.pop(), arguments)
        if isinstance(made, Inert) and keywords:
            made.state = keywords
        self.push(made)

    def build(self, _: Any) -> None:
        """Keeps a state as data; no `__setstate__` exists that could run."""
        state, target = self.pop(), self.top()
        if isinstance(target, Inert):
            target.state = state
        elif isinstance(target, NumpyArray):
            _fill_array(target, state)
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


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise Damaged("a tensor without a storage")
    return make_tensor(storage, offset, shape, strides, storage.dtype)


def _tensor_v3(storage: Any, *arguments: Any) -> Tensor:
    # Whether it has a gradient, and hooks, stand before its type.
    offset, shape, strides, _, _, dtype = arguments[:6]
    if not isinstance(storage, Storage):
        raise Damaged("a tensor without a storage")
    return make_tensor(storage, offset, shape, strides, dtype_named(dtype))


def _mapping(*arguments: Any) -> dict:
    if not arguments:
        return {}
    if isinstance(arguments[0], dict):
        return dict(arguments[0])
    if not isinstance(arguments[0], list | tuple):
        raise Damaged("a dictionary of something else than pairs")
    result = {}
    for pair in arguments[0]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Damaged("a dictionary of something else than pairs")
        result[key(pair[0])] = pair[1]
    return result


def _sequence(kind: Callable) -> Callable:
    def build(*arguments: Any) -> Any:
        if arguments and not isinstance(arguments[0], list | tuple | set | frozenset):
            # bytearray(10**12), say, would take memory that the file does not have.
            raise Refused(f"{kind.__name__}({type(arguments[0]).__name__})")
        return kind(map(key, arguments[0]) if arguments else ())

    return build


def _plain_sequence(kind: Callable) -> Callable:
    def build(*arguments: Any) -> Any:
        if arguments and not isinstance(arguments[0], list | tuple):
            raise Refused(f"{kind.__name__}({type(arguments[0]).__name__})")
        return kind(arguments[0] if arguments else ())

    return build


def _shown(value: Any) -> str:
    """A text as it is; of anything else, which may be endless, its type."""
    return repr(value) if isinstance(value, str) else describe(value)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "ascii", "utf-8"):
        raise Refused(f"_codecs.encode with {_shown(encoding)}")
    return text.encode(encoding)


def _array(kind: Any, *_: Any) -> NumpyArray:
    if kind != Named("numpy", "ndarray"):
        raise Refused(f"an array of class {describe(kind)}")
    return NumpyArray()


_CODE = re.compile(r"[biuf](1|2|4|8)|c(8|16)|\?|V2|bfloat16")


def _numpy_type(code: Any, *_: Any) -> NumpyType:
    if not isinstance(code, str) or not _CODE.fullmatch(code.lstrip("<>|=")):
        raise Refused(f"numpy.dtype({_shown(code)})")
    return NumpyType("b1" if code == "?" else code.lstrip("<>|="))


def _scalar(kind: Any, data: Any = None) -> Any:
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(kind, NumpyType) or not isinstance(data, bytes):
        raise Refused("a NumPy scalar of objects")
    if len(data) != kind.dtype().itemsize:
        raise Damaged("a NumPy scalar of another size")
    return np.frombuffer(data, kind.dtype())[0]


def _fill_array(target: NumpyArray, state: Any) -> None:
    """Gives an array its shape, type and bytes."""
    if not isinstance(state, tuple) or len(state) != 5:
        raise Damaged("an array without a state")
    _, shape, kind, fortran, data = state
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(kind, NumpyType) or not isinstance(data, bytes | bytearray):
        raise Refused("a NumPy array of objects")
    dtype, sizes = kind.dtype(), tuple(map(whole, shape))
    if int(np.prod(sizes, dtype=object)) * dtype.itemsize != len(data):
        raise Damaged(f"an array of shape {sizes} with {len(data)} bytes")
    array = np.frombuffer(data, dtype)
    # Columns first is the transpose of the reversed shape.
    target.array = array.reshape(sizes[::-1]).T if fortran else array.reshape(sizes)


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any = "C") -> NumpyArray:
    """An array as protocol 5 writes it."""
    if isinstance(kind, str):
        kind = _numpy_type(kind)
    target = NumpyArray()
    _fill_array(target, (1, shape, kind, order == "F", data))
    return target


def _inert(kind: str) -> Callable:
    def build(*arguments: Any) -> Inert:
        return Inert(kind, arguments)

    return build


_BUILTINS: dict[str, Callable[..., Any]] = {
    "set": _sequence(set),
    "frozenset": _sequence(frozenset),
    "list": _plain_sequence(list),
    "tuple": _plain_sequence(tuple),
    "dict": _mapping,
    "object": _inert("object"),
}
_UTILS: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor": _tensor,
    "_rebuild_tensor_v2": _tensor,
    "_rebuild_tensor_v3": _tensor_v3,
    "_rebuild_parameter": lambda data, *_: data,
    "_rebuild_parameter_with_state": lambda data, *_: data,
}
_ARRAYS: dict[str, Callable[..., Any]] = {"_reconstruct": _array, "scalar": _scalar}
# Classes of plain data, kept as the arguments that they were given.
_DATA = {
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "pathlib": ("PosixPath", "PurePath", "PurePosixPath", "WindowsPath"),
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "torch": ("device",),
    "torch.serialization": ("_get_layout",),
    # How dill writes the functions and classes in some training states (a schedule's
    # lambda). They stay descriptions: neither code nor class is ever made of them.
    **{
        module: (
            "_create_cell",
            "_create_code",
            "_create_function",
            "_create_type",
            "_get_attr",
            "_import_module",
            "_load_type",
        )
        for module in ("dill._dill", "dill.dill")
    },
}

CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": lambda _=None, *items: _mapping(*items),
    "torch.Size": _plain_sequence(tuple),
    # A subclass of a tensor (its class, its state), as the tensor that it is.
    "torch._tensor._rebuild_from_type_v2": lambda function, _, arguments, __: (
        _call_listed(function, arguments)
    ),
    "torch.Tensor": _inert("torch.Tensor"),
    "_codecs.encode": _encode,
    "numpy.dtype": _numpy_type,
    # An instance in old protocols: (class, object, None).
    "copyreg._reconstructor": lambda kind, *_: _instance(kind, ()),
    "copy_reg._reconstructor": lambda kind, *_: _instance(kind, ()),
    **{f"torch._utils.{name}": made for name, made in _UTILS.items()},
    **{f"builtins.{name}": make for name, make in _BUILTINS.items()},
    **{f"__builtin__.{name}": make for name, make in _BUILTINS.items()},
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy._core.numeric._frombuffer": _from_buffer,
    **{f"numpy.core.multiarray.{name}": made for name, made in _ARRAYS.items()},
    **{f"numpy._core.multiarray.{name}": made for name, made in _ARRAYS.items()},
    **{f"{m}.{n}": _inert(f"{m}.{n}") for m, names in _DATA.items() for n in names},
}


def _call_listed(function: Any, arguments: Any) -> Any:
    """What a pickle's call gives, by `CALLS` alone.

    Raises:
      Refused: the call is not listed.
    """
    listed = isinstance(function, Named) and str(function) in CALLS
    if not listed or not isinstance(arguments, tuple):
        raise Refused(f"a call of {describe(function)}")
    try:
        return CALLS[str(function)](*arguments)
    except (TypeError, ValueError, OverflowError) as error:
        raise Damaged(f"{function} with other arguments than it takes") from error


def _instance(kind: Any, arguments: Any) -> Any:
    """An instance whose class's constructor is not run: plain data or `Inert`.

    Raises:
      Refused: the class belongs to Python itself and is not listed.
    """
    if not isinstance(kind, Named) or not isinstance(arguments, tuple):
        raise Refused(f"an instance of {describe(kind)}")
    if str(kind) in CALLS:
        return _call_listed(kind, arguments)
    if _is_of_python(kind.module):
        raise Refused(f"an instance of {kind}")
    return Inert(str(kind), arguments)


def _is_of_python(module: str) -> bool:
    """Whether a module belongs to Python, where what runs programs lives."""
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names | {"posix", "nt", "__builtin__", "copy_reg"}
