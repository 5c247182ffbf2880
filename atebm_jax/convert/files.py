"""Checkpoint files as trees of arrays, whatever wrote them, without PyTorch.

safetensors, and the three ways in which `torch.save` has written files, each read as
data:

* a zip archive: `NAME/data.pkl` and one uncompressed record `NAME/data/KEY` a storage
  (since PyTorch 1.6);
* a stream: five pickles, then the storages one behind the other (until 1.5);
* a tar archive with the members `storages`, `tensors` and `pickle` (before 0.1.10).

Each of these gives the tree that was saved, with `values.Tensor` for tensors, and what
reads one tensor, so that only the chosen weights are read.
"""

import hashlib
import io
import mmap
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from atebm_jax.convert import pickles
from atebm_jax.convert.values import (
    Damaged,
    Named,
    NumpyArray,
    Refused,
    Storage,
    Tensor,
    make_tensor,
    storage_named,
    whole,
)
from atebm_jax.convert.values import key as key_of
from atebm_jax.errors import UserError

SUFFIXES = (".pt", ".pth", ".ckpt", ".tar", ".safetensors", ".bin")

_ADVICE = (
    "this reader never runs code from a file; save the weights alone where you trust "
    "it: torch.save(model.state_dict(), 'weights.pt')"
)

# What files that are no checkpoints begin with, and what to do about them.
_OTHERS: dict[bytes, str] = {
    b"<!doctype": "a web page: the download was answered by a page, fetch the file",
    b"<html": "a web page: the download was answered by a page, fetch the file",
    b"<?xml": "a web answer (XML): the download failed, fetch the file again",
    b"version https://git-lfs": "a pointer of git-lfs: run 'git lfs pull' first",
    b"{": "JSON text: give the file with the weights",
    b"\x1f\x8b": "compressed with gzip: unpack it with 'gunzip' first",
    b"BZh": "compressed with bzip2: unpack it with 'bunzip2' first",
    b"\xfd7zXZ": "compressed with xz: unpack it with 'unxz' first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"\x89HDF": "HDF5, which Keras writes: only PyTorch's formats are read",
    b"\x93NUMPY": "a single NumPy array: only PyTorch's formats are read",
}


ReadFn = Callable[[Tensor], np.ndarray]

MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

# Pickles in archives describe tensors, they do not hold them.
_LARGEST_PICKLE = 2**30


class Source(NamedTuple):
    """A checkpoint file, opened.

    Attributes:
      path: the file.
      sha256: of its bytes, in hexadecimal.
      tree: what was saved; tensors are `values.Tensor` or NumPy arrays.
      read: turns a tensor of the tree into an array.
      metadata: texts beside the arrays (safetensors).
    """

    path: str
    sha256: str
    tree: Any
    read: Callable[[Any], np.ndarray]
    metadata: dict[str, str]


def is_array(value: Any) -> bool:
    """Whether a leaf of a source's tree is an array or stands for one."""
    return isinstance(value, Tensor | NumpyArray | np.ndarray)


def shape(value: Any) -> tuple[int, ...]:
    """Shape of a leaf, read or not."""
    array = getattr(value, "array", value)
    return tuple(array.shape) if array is not None else ()


def open_source(path: str | os.PathLike) -> Source:
    """Opens a checkpoint: `torch.save` of any age, or safetensors.

    Raises:
      UserError: no such file, no checkpoint, damaged, or it asks for more than weights.
    """
    path = os.path.expanduser(os.fspath(path))
    if not os.path.isfile(path):
        there = "is no file" if os.path.exists(path) else "does not exist"
        what = "is a folder" if os.path.isdir(path) else there
        raise UserError(f"--from={path} {what}: give a file ({', '.join(SUFFIXES)}).")
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            head = file.read(512)
        tree, read, metadata = _reader(path, head)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:
        raise _explained(path, error) from error

    def read_leaf(value: Any) -> np.ndarray:
        if isinstance(value, NumpyArray):
            value = value.array
        if isinstance(value, np.ndarray):
            return value
        try:
            return read(value)
        except Exception as error:
            raise _explained(path, error) from error

    return Source(path, sha256, tree, read_leaf, metadata)


def _reader(path: str, head: bytes) -> tuple[Any, ReadFn, dict[str, str]]:
    if not head:
        raise UserError(f"{path} is empty (0 bytes): fetch it again.")
    start = head.lstrip().lower()
    for beginning, what in _OTHERS.items():
        if head.startswith(beginning) or start.startswith(beginning):
            raise UserError(f"{path} is no checkpoint but {what}.")
    if path.endswith(".safetensors") or _looks_like_safetensors(path, head):
        return _read_safetensors(path)
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise Damaged("a zip archive without its end")
        return *_read_zip(path), {}
    read = _read_tar if tarfile.is_tarfile(path) else _read_stream
    with open(path, "rb") as file:
        return *read(file), {}


def _explained(path: str, error: Exception) -> UserError:
    """One sentence for what a file did wrong; nothing in it can steer a terminal."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, Refused):
        text = f"{path} is refused: it asks for {error}; {_ADVICE}."
    else:
        what = error if isinstance(error, Damaged) else type(error).__name__
        text = (
            f"{path} is truncated, damaged or no PyTorch checkpoint ({what}): compare "
            "its size and SHA-256 with the source's and fetch it again."
        )
    return UserError(printable(text))


def printable(text: str) -> str:
    """Nothing in a file's names can steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:1000])


def _looks_like_safetensors(path: str, head: bytes) -> bool:
    """A length, then JSON: no other format here begins so."""
    if len(head) < 10 or head[8:9] != b"{":
        return False
    (length,) = struct.unpack("<Q", head[:8])
    return 2 <= length <= os.path.getsize(path)


def _read_safetensors(path: str) -> tuple[Any, ReadFn, dict[str, str]]:
    try:
        import safetensors
    except ImportError as error:
        raise UserError(
            f"{path} needs the package safetensors: pip install 'atebm_jax[convert]'."
        ) from error
    try:
        file = safetensors.safe_open(path, framework="numpy")
        names = list(file.keys())
    except safetensors.SafetensorError as error:
        raise Damaged(f"safetensors: {error}") from error
    arrays = {name: file.get_tensor(name) for name in names}
    return arrays, _no_tensor, dict(file.metadata() or {})


def _read_zip(path: str) -> tuple[Any, ReadFn]:
    """Reads a zip archive; its records are read when a tensor is.

    The archive keeps its file open for as long as something can be read from it.
    """
    archive = zipfile.ZipFile(path)
    size = os.path.getsize(path)
    names = set(archive.namelist())
    pickled = [n for n in names if n.count("/") <= 1 and n.endswith("data.pkl")]
    if len(pickled) != 1:
        kinds = sorted({n.rpartition(".")[2] for n in names if "." in n})[:4]
        raise Damaged(f"a zip archive without data.pkl (it holds {', '.join(kinds)})")
    prefix = pickled[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in names:
        raise Refused("a TorchScript program")
    order = f"{prefix}byteorder"
    if order in names and _record(archive, order, 16) != b"little":
        raise Refused("big-endian numbers")
    pickle = _record(archive, pickled[0], min(size, _LARGEST_PICKLE))
    tree = pickles.load(io.BytesIO(pickle), _storage_of)

    def read(tensor: Tensor) -> np.ndarray:
        data = _record(archive, f"{prefix}data/{tensor.storage.key}", size)
        return _view(np.frombuffer(data, np.uint8), tensor)

    return tree, read


def _record(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError as error:
        raise Damaged(f"no record {name!r}") from error
    # PyTorch never compresses: what unpacks to more than it is was made to.
    if info.compress_type != zipfile.ZIP_STORED:
        raise Refused(f"a compressed record {name!r}")
    if (size := max(info.file_size, info.compress_size)) > limit:
        raise Damaged(f"a record {name!r} of {size} bytes")
    return archive.read(info)


def _storage_of(name: Any) -> Storage:
    """What a persistent id of PyTorch means: ("storage", type, key, device, count)."""
    if not isinstance(name, tuple) or len(name) not in (5, 6):
        raise Refused("an object from outside the file")
    tag, kind, key, _, count = name[:5]
    if tag not in ("storage", b"storage") or not isinstance(key, str | int):
        raise Refused("an object from outside the file")
    storage = Storage(key, storage_named(kind), whole(count))
    if len(name) == 6 and name[5] is not None:
        _, start, size = name[5]
        storage.start, storage.count = whole(start), whole(size)
    return storage


def _view(data: np.ndarray, tensor: Tensor) -> np.ndarray:
    """A tensor's elements, without a copy.

    Args:
      data: [N] uint8, the whole record of the tensor's storage.
      tensor: what to take of it.

    Raises:
      Damaged: the record is shorter than the pickle says.
    """
    storage, dtype = tensor.storage, tensor.dtype
    width = 1 if storage.dtype is None else storage.dtype.itemsize
    first, size = storage.start * width, storage.count * width
    if first + size > len(data):
        raise Damaged(f"a storage of {len(data)} bytes where {size} were announced")
    used = data[first : first + size]
    elements = used[: len(used) // dtype.itemsize * dtype.itemsize].view(dtype)
    return np.lib.stride_tricks.as_strided(
        elements[tensor.offset :],
        tensor.shape,
        tuple(s * dtype.itemsize for s in tensor.strides),
        writeable=False,
    )


def _read_stream(file: BinaryIO) -> tuple[Any, ReadFn]:
    """Reads the stream format, or a plain pickle of NumPy arrays."""
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    stream: Any = data
    first = pickles.load(stream)
    if first != MAGIC:
        return first, _no_tensor
    protocol, system = pickles.load(stream), pickles.load(stream)
    if protocol != _PROTOCOL:
        raise Damaged(f"another protocol than {_PROTOCOL}")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("big-endian numbers")
    storages: dict[Any, Storage] = {}

    def persistent(name: Any) -> Any:
        if isinstance(name, tuple) and name and name[0] in ("module", b"module"):
            return name[1]  # a class with its source, which nobody needs
        storage = _storage_of(name)
        storages.setdefault(storage.key, storage)
        return storage

    tree, keys = pickles.load(stream, persistent), pickles.load(stream)
    places = _places(data, keys, storages)
    buffer = np.frombuffer(data, np.uint8)

    def read(tensor: Tensor) -> np.ndarray:
        return _view(buffer[places[tensor.storage.key]], tensor)

    return tree, read


def _places(data: mmap.mmap, keys: Any, storages: dict[Any, Storage]) -> dict:
    """Where each storage's bytes lie behind the pickles."""
    if not isinstance(keys, list) or set(map(key_of, keys)) != set(storages):
        raise Damaged("a list of other storages than the tensors use")
    places = {}
    for key in keys:
        dtype = storages[key].dtype
        (count,) = struct.unpack("<q", data.read(8))
        size = whole(count) * (1 if dtype is None else dtype.itemsize)
        if data.tell() + size > len(data):
            raise Damaged("storages that break off")
        places[key] = slice(data.tell(), data.tell() + size)
        data.seek(size, io.SEEK_CUR)
    return places


def _no_tensor(tensor: Tensor) -> np.ndarray:
    """Reads tensors where there can be none."""
    raise Damaged("a tensor without a storage")


def _read_tar(file: BinaryIO) -> tuple[Any, ReadFn]:
    """Reads the tar format; nothing is unpacked to the disk."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        members = {name: _member(archive, name) for name in _MEMBERS}
    records, objects = _tar_storages(io.BytesIO(members["storages"]))
    _tar_tensors(io.BytesIO(members["tensors"]), objects)

    def persistent(name: Any) -> Any:
        if isinstance(name, tuple) and name:
            return name[0]
        return objects[int(name)]

    tree = pickles.load(io.BytesIO(members["pickle"]), persistent)
    return tree, lambda tensor: _view(records[tensor.storage.key], tensor)


_MEMBERS = ("storages", "tensors", "pickle")


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        info = archive.getmember(name)
    except KeyError as error:
        kinds = ", ".join(archive.getnames()[:4])
        raise Damaged(f"a tar archive without {name!r} (it holds {kinds})") from error
    # A sparse one claims zeros, as many as it likes.
    member = archive.extractfile(info) if info.isreg() else None
    if member is None or info.issparse():
        raise Damaged(f"a tar archive whose {name!r} is no file")
    return member.read()


def _tar_storages(file: BinaryIO) -> tuple[dict[Any, np.ndarray], dict[Any, Any]]:
    records: dict[Any, np.ndarray] = {}
    objects: dict[Any, Any] = {}
    for _ in range(whole(pickles.load(file))):
        key, _, kind = pickles.load(file)
        dtype = storage_named(kind)
        width = 1 if dtype is None else dtype.itemsize
        (count,) = struct.unpack("<q", file.read(8))
        data = file.read(whole(count) * width)
        if len(data) != count * width:
            raise Damaged("storages that break off")
        records[key_of(key)] = np.frombuffer(data, np.uint8)
        objects[key] = Storage(key, dtype, count)
    for key, root, start, count in pickles.load(file):
        whole_storage = objects[key_of(root)]
        objects[key_of(key)] = Storage(
            whole_storage.key, whole_storage.dtype, whole(count), whole(start)
        )
    return records, objects


def _tar_tensors(file: BinaryIO, objects: dict[Any, Any]) -> None:
    """Adds the tensors to the storages: each a header and its geometry."""
    for _ in range(whole(pickles.load(file))):
        key, storage_key, kind = pickles.load(file)
        if not isinstance(kind, Named):
            raise Damaged("a tensor without a type")
        # The number of axes is followed by four bytes that mean nothing.
        axes, _ = struct.unpack("<ii", file.read(8))
        if not 0 <= axes <= 16:
            raise Damaged(f"a tensor with {axes} axes")
        numbers = struct.unpack(f"<{2 * axes + 1}q", file.read(16 * axes + 8))
        storage = objects[key_of(storage_key)]
        objects[key_of(key)] = make_tensor(
            storage,
            numbers[-1],
            numbers[:axes],
            numbers[axes:-1],
            storage.dtype or np.dtype(np.uint8),
        )
