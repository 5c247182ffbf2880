"""The three ways in which `torch.save` has written files, each read as data.

* a zip archive: `NAME/data.pkl` and one uncompressed record `NAME/data/KEY` a storage
  (since PyTorch 1.6);
* a stream: five pickles, then the storages one behind the other (until 1.5);
* a tar archive with the members `storages`, `tensors` and `pickle` (before 0.1.10).

Each function returns the tree that was saved, with `values.Tensor` for tensors, and
what reads one tensor, so that only the chosen weights are read.
"""

import io
import mmap
import struct
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from atebm_jax.convert import pickles
from atebm_jax.convert.values import (
    Damaged,
    Named,
    Refused,
    Storage,
    Tensor,
    make_tensor,
    storage_named,
    whole,
)
from atebm_jax.convert.values import key as plain_key

ReadFn = Callable[[Tensor], np.ndarray]

MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

# Pickles in archives describe tensors, they do not hold them.
_LARGEST_PICKLE = 2**30


def read_zip(file: BinaryIO) -> tuple[Any, ReadFn]:
    """Reads a zip archive; its records are read when a tensor is."""
    archive = zipfile.ZipFile(file)
    size = file.seek(0, io.SEEK_END)
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
        return view(np.frombuffer(data, np.uint8), tensor)

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


def view(data: np.ndarray, tensor: Tensor) -> np.ndarray:
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


def read_stream(file: BinaryIO) -> tuple[Any, ReadFn]:
    """Reads the stream format, or a plain pickle of NumPy arrays."""
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    stream: Any = data
    first = pickles.load(stream)
    if first != MAGIC:
        return first, no_tensor
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
        return view(buffer[places[tensor.storage.key]], tensor)

    return tree, read


def _places(data: mmap.mmap, keys: Any, storages: dict[Any, Storage]) -> dict:
    """Where each storage's bytes lie behind the pickles."""
    if not isinstance(keys, list) or set(map(plain_key, keys)) != set(storages):
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


def no_tensor(tensor: Tensor) -> np.ndarray:
    """Reads tensors where there can be none."""
    raise Damaged("a tensor without a storage")


def read_tar(file: BinaryIO) -> tuple[Any, ReadFn]:
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
    return tree, lambda tensor: view(records[tensor.storage.key], tensor)


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
        records[plain_key(key)] = np.frombuffer(data, np.uint8)
        objects[key] = Storage(key, dtype, count)
    for key, root, start, count in pickles.load(file):
        whole_storage = objects[plain_key(root)]
        objects[plain_key(key)] = Storage(
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
        storage = objects[plain_key(storage_key)]
        objects[plain_key(key)] = make_tensor(
            storage,
            numbers[-1],
            numbers[:axes],
            numbers[axes:-1],
            storage.dtype or np.dtype(np.uint8),
        )
