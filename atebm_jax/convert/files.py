"""Checkpoint files as trees of arrays, whatever wrote them, without PyTorch."""

import contextlib
import hashlib
import os
import struct
import tarfile
import weakref
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from atebm_jax.convert import archives
from atebm_jax.convert.values import Damaged, NumpyArray, Refused, Tensor
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


def _reader(path: str, head: bytes) -> tuple[Any, archives.ReadFn, dict[str, str]]:
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
    read = archives.read_tar if tarfile.is_tarfile(path) else archives.read_stream
    with open(path, "rb") as file:
        return *read(file), {}


def _read_zip(path: str) -> tuple[Any, archives.ReadFn]:
    """Keeps the file open for as long as tensors can be read from it."""
    with contextlib.ExitStack() as stack:
        tree, read = archives.read_zip(stack.enter_context(open(path, "rb")))
        weakref.finalize(read, stack.pop_all().close)
    return tree, read


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
    return UserError("".join(c if c.isprintable() else "?" for c in text[:1000]))


def _looks_like_safetensors(path: str, head: bytes) -> bool:
    """A length, then JSON: no other format here begins so."""
    if len(head) < 10 or head[8:9] != b"{":
        return False
    (length,) = struct.unpack("<Q", head[:8])
    return 2 <= length <= os.path.getsize(path)


def _read_safetensors(path: str) -> tuple[Any, archives.ReadFn, dict[str, str]]:
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
    return arrays, archives.no_tensor, dict(file.metadata() or {})
