"""What a checkpoint's pickle is read as: plain data, and stand-ins for the rest."""

import math
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy learns the name "bfloat16")
import numpy as np


class Refused(Exception):
    """A pickle asks for more than weights need; the text says for what."""


class Damaged(Exception):
    """A file ends early or contradicts itself."""


@dataclass(frozen=True)
class Named:
    """A module's attribute that a pickle refers to; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Inert:
    """An instance of some class as data, with the items of a mapping; nothing ran."""

    kind: str
    arguments: tuple = ()
    state: Any = None
    items: dict = field(default_factory=dict)


@dataclass(eq=False)
class Storage:
    """A flat array of the file: `count` elements from `start` of record `key`."""

    key: Any
    dtype: np.dtype
    count: int
    start: int = 0


@dataclass(eq=False)
class Tensor:
    """A strided view of a storage, not read yet; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


# PyTorch's storages, and the name of their dtype in PyTorch and NumPy.
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    # Bytes: the tensor says what they are.
    "UntypedStorage": "uint8",
}
_DTYPES = {name: name for name in _STORAGES.values()}


def dtype_named(value: Any) -> np.dtype:
    """The dtype that `torch.float32` and the like mean."""
    return _dtype(value, "tensor", _DTYPES, ("torch",))


def storage_named(value: Any) -> np.dtype:
    """The dtype of `torch.FloatStorage` and the like."""
    return _dtype(value, "storage", _STORAGES, ("torch", "torch.cuda", "torch.storage"))


def _dtype(
    value: Any, what: str, dtypes: dict[str, str], modules: tuple[str, ...]
) -> np.dtype:
    known = isinstance(value, Named) and value.module in modules
    if known and value.name in dtypes:
        return np.dtype(dtypes[value.name])
    raise Refused(f"a {what} of type {describe(value)}")


def whole(value: Any) -> int:
    """An int that is no bool and not negative."""
    if type(value) is not int or not 0 <= value < 2**62:
        raise Damaged(f"{type(value).__name__} where a size was expected")
    return value


def make_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, dtype: np.dtype | None = None
) -> Tensor:
    """A view that lies inside its storage and repeats no element, or `Damaged`.

    `offset`, `shape` and `strides` are in elements of `dtype`, default the storage's.
    """
    if not isinstance(storage, Storage):
        raise Damaged("a tensor without a storage")
    dtype = storage.dtype if dtype is None else dtype
    if not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise Damaged("a tensor without a shape")
    start = whole(offset)
    sizes, steps = tuple(map(whole, shape)), tuple(map(whole, strides))
    if len(sizes) != len(steps) or len(sizes) > 16:
        raise Damaged("a tensor with a shape and other strides")
    count = math.prod(sizes)
    room = storage.count * storage.dtype.itemsize // dtype.itemsize
    last = start + sum((n - 1) * s for n, s in zip(sizes, steps, strict=True))
    if count and (last >= room or count > room):
        raise Damaged(f"a tensor of shape {sizes} in a storage of {room} elements")
    return Tensor(storage, start, sizes, steps, dtype)


def describe(value: Any) -> str:
    """A value of a pickle in short, for a message."""
    if isinstance(value, str):
        return repr(value[:80])
    if isinstance(value, Named) and value.module in ("posix", "nt"):
        return f"{value} (os.{value.name})"  # the name that people know
    if isinstance(value, Named):
        return str(value)
    if isinstance(value, Inert):
        names = [str(x) for x in value.arguments if isinstance(x, str | Named)]
        # Only the first: each instance can hold the next one twice, and so on.
        inner = next((x for x in value.arguments if isinstance(x, Inert)), None)
        names += [] if inner is None else [describe(inner)]
        return f"{value.kind}({', '.join(names)[:80]})"
    return f"a value of type {type(value).__name__}"


def key(value: Any) -> Any:
    """A value that may be hashed: a plain one, or a short tuple of plain ones."""
    plain = (str, bytes, int, float, bool, type(None), Named)
    if isinstance(value, (*plain, np.generic, Inert, Tensor)):
        return value
    if isinstance(value, tuple) and all(isinstance(x, plain) for x in value):
        return value
    raise Damaged(f"a dictionary key of type {type(value).__name__}")
