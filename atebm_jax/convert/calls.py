"""The only functions that a checkpoint's pickle may call.

Nothing of a file's own choosing is imported or called: a name in a pickle stays a
`Named`, and a call on it runs the function of ours that `CALLS` lists under that name.
"""

import re
import sys
from collections.abc import Callable
from typing import Any

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


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise Damaged("a tensor without a storage")
    return make_tensor(storage, offset, shape, strides, storage.dtype)


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    *_: Any,
) -> Tensor:
    del grad, hooks
    if not isinstance(storage, Storage):
        raise Damaged("a tensor without a storage")
    return make_tensor(storage, offset, shape, strides, dtype_named(dtype))


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A subclass of a tensor, as the tensor that it is."""
    del kind, state
    return call(function, arguments)


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


def _default_mapping(*arguments: Any) -> dict:
    return _mapping(*arguments[1:])


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


def fill_array(target: NumpyArray, state: Any) -> None:
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
    fill_array(target, (1, shape, kind, order == "F", data))
    return target


def _inert(kind: str) -> Callable:
    def build(*arguments: Any) -> Inert:
        return Inert(kind, arguments)

    return build


def _reconstructor(kind: Any, *_: Any) -> Any:
    """`copyreg._reconstructor(class, object, None)`: an instance in old protocols."""
    return instance(kind, ())


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
    "_rebuild_parameter": _parameter,
    "_rebuild_parameter_with_state": _parameter,
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
    "collections.defaultdict": _default_mapping,
    "torch.Size": _plain_sequence(tuple),
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Tensor": _inert("torch.Tensor"),
    "_codecs.encode": _encode,
    "numpy.dtype": _numpy_type,
    "copyreg._reconstructor": _reconstructor,
    "copy_reg._reconstructor": _reconstructor,
    **{f"torch._utils.{name}": made for name, made in _UTILS.items()},
    **{f"builtins.{name}": make for name, make in _BUILTINS.items()},
    **{f"__builtin__.{name}": make for name, make in _BUILTINS.items()},
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy._core.numeric._frombuffer": _from_buffer,
    **{f"numpy.core.multiarray.{name}": made for name, made in _ARRAYS.items()},
    **{f"numpy._core.multiarray.{name}": made for name, made in _ARRAYS.items()},
    **{f"{m}.{n}": _inert(f"{m}.{n}") for m, names in _DATA.items() for n in names},
}


def call(function: Any, arguments: Any) -> Any:
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


def instance(kind: Any, arguments: Any) -> Any:
    """An instance whose class's constructor is not run: plain data or `Inert`.

    Raises:
      Refused: the class belongs to Python itself and is not listed.
    """
    if not isinstance(kind, Named) or not isinstance(arguments, tuple):
        raise Refused(f"an instance of {describe(kind)}")
    if str(kind) in CALLS:
        return call(kind, arguments)
    if is_of_python(kind.module):
        raise Refused(f"an instance of {kind}")
    return Inert(str(kind), arguments)


def is_of_python(module: str) -> bool:
    """Whether a module belongs to Python, where what runs programs lives."""
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names | {"posix", "nt", "__builtin__", "copy_reg"}
