"""CIFAR-10 and CIFAR-100 from the archive that their authors publish."""

import os
import tarfile
import zlib
from pathlib import PurePosixPath

import numpy as np

from atebm_jax.data.sources import ArraySource
from atebm_jax.errors import UserError

_PIXELS = 3 * 32 * 32
# How the files of a split begin in the archives of CIFAR-10 and CIFAR-100.
_FILES = {"train": ("data_batch_", "train.bin"), "test": ("test_batch", "test.bin")}
_NAMES = ("batches.meta.txt", "fine_label_names.txt")


def open_cifar(rest: str) -> ArraySource:
    """Reads `cifar-10-binary.tar.gz` or `cifar-100-binary.tar.gz` into memory.

    The binary version holds plain bytes. The Python version is not read: it holds
    pickles, which can run code.

    Args:
      rest: PATH:SPLIT, SPLIT being train or test.

    Raises:
      UserError: no such file or split, or the file is not such an archive.
    """
    spec = f"cifar:{rest}"
    path, _, split = rest.rpartition(":")
    if split not in _FILES or not path:
        raise UserError(
            f"{spec}: write cifar:PATH:train or cifar:PATH:test, PATH being "
            "cifar-10-binary.tar.gz or cifar-100-binary.tar.gz."
        )
    try:
        with tarfile.open(os.path.expanduser(path)) as archive:
            files = {PurePosixPath(m.name).name: m for m in archive if m.isfile()}
            wanted = sorted(n for n in files if n.startswith(_FILES[split]))
            content = b"".join(_read(archive, files[name]) for name in wanted)
            names = b"".join(_read(archive, files[n]) for n in _NAMES if n in files)
            # To the end, where gzip has the checksum of all.
            while archive.fileobj is not None and archive.fileobj.read(2**20):
                pass
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{spec}: {path} cannot be read: {error}.") from error
    classes = [name for name in names.decode(errors="replace").split("\n") if name]
    # CIFAR-100 has the superclass before the class.
    labels = 2 if len(classes) == 100 else 1
    size = labels + _PIXELS
    if not content or len(content) % size or len(classes) not in (10, 100):
        raise UserError(
            f"{spec}: {path} is no binary version of CIFAR: of {split} it has "
            f"{len(content)} bytes, where images take {size} each, and "
            f"{len(classes)} names of classes; give cifar-10-binary.tar.gz or "
            "cifar-100-binary.tar.gz."
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, size)
    images = rows[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return ArraySource(
        np.ascontiguousarray(images),
        rows[:, labels - 1].astype(np.int32),
        class_names=classes,
        spec=spec,
    )


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return b"" if file is None else file.read()
