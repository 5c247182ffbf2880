"""What a checkpoint's pickle is read as: plain data, and stand-ins for the rest."""

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np


class Refused(Exception):
    """A pickle that asks for more than weights need; says what."""


class Damaged(Exception):
    """A file that ends early or contradicts itself."""


@dataclass(frozen=True)
class Named:
    """A module's attribute that a pickle refers to; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Inert:
    """An instance of some class, kept as data: nothing was built or run."""

    kind: str
    arguments: tuple = ()
    state: Any = None
    items: list = field(default_factory=list)


@dataclass(eq=False)
class Storage:
    """A flat array of the file: `count` elements from `start` of record `key`."""

    key: Any
    dtype: np.dtype | None  # None: bytes, the tensor says what they are
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


@dataclass(eq=False)
class NumpyArray:
    """An array under construction: filled by its state."""

    array: np.ndarray | None = None


@dataclass(eq=False)
class NumpyType:
    """A plain numeric NumPy dtype under construction."""

    code: str
    order: str = "<"

    def dtype(self) -> np.dtype:
        return np.dtype(self.code).newbyteorder(">" if self.order == ">" else "<")


# PyTorch's dtypes, and the names of the storages of each.
DTYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": np.bool_,
}
STORAGES = {
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
}


def dtype_named(value: Any) -> np.dtype:
    """The dtype that `torch.float32` and the like mean."""
    if isinstance(value, Named) and value.module == "torch" and value.name in DTYPES:
        return np.dtype(DTYPES[value.name])
    raise Refused(f"a tensor of type {describe(value)}")


def storage_named(value: Any) -> np.dtype | None:
    """The dtype of `torch.FloatStorage` and the like; None for untyped ones."""
    if isinstance(value, Named) and value.module in (
        "torch",
        "torch.cuda",
        "torch.storage",
    ):
        if value.name in STORAGES:
            return np.dtype(DTYPES[STORAGES[value.name]])
        if value.name == "UntypedStorage":
            return None
    raise Refused(f"a storage of type {describe(value)}")


def whole(value: Any) -> int:
    """An int that is no bool and not negative."""
    if type(value) is not int or not 0 <= value < 2**62:
        raise Damaged(f"{type(value).__name__} where a size was expected")
    return value


def make_tensor(
    storage: Storage, offset: Any, shape: Any, strides: Any, dtype: np.dtype
) -> Tensor:
    """A view that lies inside its storage and repeats no element.

    Raises:
      Damaged: it does not.
    """
    if not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise Damaged("a tensor without a shape")
    sizes, steps = tuple(map(whole, shape)), tuple(map(whole, strides))
    start, count = whole(offset), 1
    if len(sizes) != len(steps) or len(sizes) > 16:
        raise Damaged("a tensor with a shape and other strides")
    for size in sizes:
        count *= size
    width = 1 if storage.dtype is None else storage.dtype.itemsize
    room = storage.count * width // dtype.itemsize
    last = start + sum((n - 1) * s for n, s in zip(sizes, steps, strict=True))
    if count and (last >= room or count > room):
        raise Damaged(f"a tensor of shape {sizes} in a storage of {room} elements")
    return Tensor(storage, start, sizes, steps, dtype)


def describe(value: Any) -> str:
    """A pickle's function, for a message."""
    if isinstance(value, Named) and value.module in ("posix", "nt"):
        return f"{value} (os.{value.name})"  # the name that people know
    if isinstance(value, Named):
        return str(value)
    if isinstance(value, Inert):
        names = [str(x) for x in value.arguments if isinstance(x, str | Named)]
        # The first alone: each may hold the next one twice, and so on.
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
