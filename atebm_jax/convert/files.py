"""Checkpoint files as trees of arrays, whatever wrote them, without PyTorch.

safetensors, and the three ways in which `torch.save` has written files, each read as
data:

* a zip archive: `NAME/data.pkl` and one uncompressed record `NAME/data/KEY` a storage
  (since PyTorch 1.6);
* a stream: five pickles, then the storages one behind the other (until 1.5);
* a tar archive with the members `storages`, `tensors` and `pickle` (before 0.1.10).

Each of these gives the tree that was saved, with `values.Tensor` for tensors, and what
finds a storage's bytes, so that only the chosen weights are read.
"""

import contextlib
import hashlib
import io
import mmap
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from atebm_jax.convert import pickles, values
from atebm_jax.convert.values import Damaged, Refused, Storage, Tensor, whole
from atebm_jax.errors import UserError
from atebm_jax.names import printable

_SUFFIXES = (".pt", ".pth", ".ckpt", ".tar", ".safetensors", ".bin")

_ADVICE = (
    "this reader never runs code from a file; save the weights alone where you trust "
    "it: torch.save(model.state_dict(), 'weights.pt')"
)

# How files that are not checkpoints begin, and what to do about them.
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

# The first two pickles of a stream.
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

# A pickle in an archive describes tensors; it does not contain them.
_LARGEST_PICKLE = 2**30

# Names in a file can have any length; messages are cut to this one.
_LONGEST_TEXT = 1000

# The bytes of a storage by its key: [N] uint8.
_FindFn = Callable[[Any], np.ndarray]
_NO_STORAGES: dict[Any, np.ndarray] = {}


class Source(NamedTuple):
    """A checkpoint file, opened."""

    path: str
    sha256: str  # of its bytes, in hexadecimal
    tree: Any  # what was saved; tensors are `values.Tensor` or NumPy arrays
    read: Callable[[Any], np.ndarray]  # turns a tensor of the tree into an array
    metadata: dict[str, str]  # texts beside the arrays (safetensors)


def is_array(value: Any) -> bool:
    """Whether a leaf of a tree is an array, read or not."""
    return isinstance(value, Tensor | np.ndarray)


def shown(text: str) -> str:
    """Shortens a text with names of a file, and escapes what could steer a terminal."""
    return printable(text[:_LONGEST_TEXT])


def refusal(text: str) -> UserError:
    """The error for a faulty file; the text may hold names from the file."""
    return UserError(shown(text))


def open_source(path: str | os.PathLike) -> Source:
    """Opens a checkpoint: `torch.save` of any age, or safetensors.

    Raises:
      UserError: no such file, no checkpoint, damaged, or it asks for more than weights.
    """
    path = os.path.expanduser(os.fspath(path))
    if not os.path.isfile(path):
        there = "is no file" if os.path.exists(path) else "does not exist"
        what = "is a folder" if os.path.isdir(path) else there
        raise refusal(f"--from={path} {what}: give a file ({', '.join(_SUFFIXES)}).")
    with _faults_explained(path), open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        tree, find, metadata = _opened(path, file)

    def read(value: Any) -> np.ndarray:
        if isinstance(value, np.ndarray):
            return value
        with _faults_explained(path):
            return _view(find(value.storage.key), value)

    return Source(path, sha256, tree, read, metadata)


def _opened(path: str, file: BinaryIO) -> tuple[Any, _FindFn, dict[str, str]]:
    """Recognises the format by the first bytes: gives tree, storages and metadata."""
    head = file.read(512)
    file.seek(0)
    if not head:
        raise refusal(f"{path} is empty (0 bytes): fetch it again.")
    for beginning, what in _OTHERS.items():
        if head.startswith(beginning) or head.lstrip().lower().startswith(beginning):
            raise refusal(f"{path} is no checkpoint but {what}.")
    # Only safetensors begins with a length and then JSON.
    length = int.from_bytes(head[:8], "little")
    fits = head[8:9] == b"{" and 2 <= length <= os.path.getsize(path)
    if path.endswith(".safetensors") or fits:
        tree, metadata = _read_safetensors(path)
        return tree, _NO_STORAGES.__getitem__, metadata
    if head.startswith(b"PK"):
        return *_read_zip(path), {}
    read = _read_tar if tarfile.is_tarfile(path) else _read_stream
    return *read(file), {}


@contextlib.contextmanager
def _faults_explained(path: str) -> Iterator[None]:
    """Turns every exception of reading a file into one sentence."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise refusal(f"{path} cannot be read: {error.strerror or error}.") from error
    except Refused as error:
        text = f"{path} is refused: it asks for {error}; {_ADVICE}."
        raise refusal(text) from error
    except Exception as error:
        what = error if isinstance(error, Damaged) else type(error).__name__
        raise refusal(
            f"{path} is truncated, damaged or no PyTorch checkpoint ({what}): compare "
            "its size and SHA-256 with the source's and fetch it again."
        ) from error


def _read_safetensors(path: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    import safetensors  # slow to import

    try:
        file = safetensors.safe_open(path, framework="numpy")
        arrays = {name: file.get_tensor(name) for name in list(file.keys())}
    except safetensors.SafetensorError as error:
        raise Damaged(f"safetensors: {error}") from error
    return arrays, dict(file.metadata() or {})


def _read_zip(path: str) -> tuple[Any, _FindFn]:
    """Reads a zip archive; its records are read when a tensor is.

    The archive keeps its file open for as long as something can be read from it.
    """
    if not zipfile.is_zipfile(path):
        raise Damaged("a zip archive without its end")
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

    def find(key: Any) -> np.ndarray:
        return np.frombuffer(_record(archive, f"{prefix}data/{key}", size), np.uint8)

    return pickles.load(io.BytesIO(pickle), _storage_of), find


def _record(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError as error:
        raise Damaged(f"no record {name!r}") from error
    # PyTorch never compresses: a compressed record may be made to exhaust memory.
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
    storage = Storage(key, values.storage_named(kind), whole(count))
    if len(name) == 6 and name[5] is not None:
        _, start, size = name[5]
        storage.start, storage.count = whole(start), whole(size)
    return storage


def _view(data: np.ndarray, tensor: Tensor) -> np.ndarray:
    """A tensor's elements, without a copy, from the bytes of its storage's record."""
    storage, dtype = tensor.storage, tensor.dtype
    first, size = (n * storage.dtype.itemsize for n in (storage.start, storage.count))
    if first + size > len(data):
        raise Damaged(f"a storage of {len(data)} bytes where {size} were announced")
    used = data[first : first + size // dtype.itemsize * dtype.itemsize]
    return np.lib.stride_tricks.as_strided(
        used.view(dtype)[tensor.offset :],
        tensor.shape,
        tuple(s * dtype.itemsize for s in tensor.strides),
        writeable=False,
    )


def _read_stream(file: BinaryIO) -> tuple[Any, _FindFn]:
    """Reads the stream format, or a plain pickle of NumPy arrays."""
    data: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    first = pickles.load(data)
    if not isinstance(first, int) or first != _MAGIC:
        return first, _NO_STORAGES.__getitem__
    protocol, system = pickles.load(data), pickles.load(data)
    if protocol != _PROTOCOL:
        raise Damaged(f"another protocol than {_PROTOCOL}")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("big-endian numbers")
    storages: dict[Any, Storage] = {}

    def persistent(name: Any) -> Any:
        if isinstance(name, tuple) and name and name[0] in ("module", b"module"):
            return name[1]  # a class with its source code, which is not needed
        storage = _storage_of(name)
        storages.setdefault(storage.key, storage)
        return storage

    tree, keys = pickles.load(data, persistent), pickles.load(data)
    if not isinstance(keys, list) or set(map(values.key, keys)) != set(storages):
        raise Damaged("a list of other storages than the tensors use")
    places: dict[Any, slice] = {}
    buffer = np.frombuffer(data, np.uint8)
    for key in keys:
        size = _next_count(data) * storages[key].dtype.itemsize
        if data.tell() + size > len(data):
            raise Damaged("storages that break off")
        places[key] = slice(data.tell(), data.tell() + size)
        data.seek(size, io.SEEK_CUR)
    return tree, lambda key: buffer[places[key]]


def _next_count(file: BinaryIO) -> int:
    """Reads how many elements the next storage has."""
    return whole(struct.unpack("<q", file.read(8))[0])


def _read_tar(file: BinaryIO) -> tuple[Any, _FindFn]:
    """Reads the tar format; nothing is unpacked to the disk."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        storages, tensors, pickle = (
            io.BytesIO(_member(archive, name))
            for name in ("storages", "tensors", "pickle")
        )
    records, objects = _tar_storages(storages)
    _tar_tensors(tensors, objects)

    def persistent(name: Any) -> Any:
        if isinstance(name, tuple) and name:
            return name[0]
        return objects[int(name)]

    return pickles.load(pickle, persistent), records.__getitem__


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        info = archive.getmember(name)
    except KeyError as error:
        kinds = ", ".join(archive.getnames()[:4])
        raise Damaged(f"a tar archive without {name!r} (it holds {kinds})") from error
    # A sparse member can claim any number of zeros.
    member = archive.extractfile(info) if info.isreg() else None
    if member is None or info.issparse():
        raise Damaged(f"a tar archive whose {name!r} is no file")
    return member.read()


def _tar_storages(file: BinaryIO) -> tuple[dict[Any, np.ndarray], dict[Any, Any]]:
    """Reads the storages: the bytes of each, and storages and views by key."""
    records: dict[Any, np.ndarray] = {}
    objects: dict[Any, Any] = {}
    for _ in range(whole(pickles.load(file))):
        key, _, kind = pickles.load(file)
        storage = Storage(
            values.key(key), values.storage_named(kind), _next_count(file)
        )
        size = storage.count * storage.dtype.itemsize
        records[storage.key] = np.frombuffer(file.read(size), np.uint8)
        if len(records[storage.key]) != size:
            raise Damaged("storages that break off")
        objects[storage.key] = storage
    for key, root, start, count in pickles.load(file):
        owner = objects[values.key(root)]
        objects[values.key(key)] = Storage(
            owner.key, owner.dtype, whole(count), whole(start)
        )
    return records, objects


def _tar_tensors(file: BinaryIO, objects: dict[Any, Any]) -> None:
    """Adds the tensors to the storages: each a header and its geometry."""
    for _ in range(whole(pickles.load(file))):
        key, storage_key, kind = pickles.load(file)
        if not isinstance(kind, values.Named):
            raise Damaged("a tensor without a type")
        # Four bytes without a meaning follow the number of axes.
        axes, _ = struct.unpack("<ii", file.read(8))
        if not 0 <= axes <= 16:
            raise Damaged(f"a tensor with {axes} axes")
        numbers = struct.unpack(f"<{2 * axes + 1}q", file.read(16 * axes + 8))
        objects[values.key(key)] = values.make_tensor(
            objects[values.key(storage_key)],
            numbers[-1],
            numbers[:axes],
            numbers[axes:-1],
        )
