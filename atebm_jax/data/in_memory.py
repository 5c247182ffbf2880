"""Images in memory: arrays, scikit-learn's digits, CIFAR's published archives."""

import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np

from atebm_jax.data.sources import UNLABELLED, Example, Source
from atebm_jax.errors import UserError
from atebm_jax.names import of_class

# Bytes; hashing so many takes a second or two.
_MOST_HASHED = 2**30


class ArraySource(Source):
    """Images in memory.

    Args:
      images: [N, H, W, C] uint8, C = 1 or 3, N > 0.
      labels: [N] integers from 0, or None for unlabelled images.
      class_names: a name for each class; its length sets `num_classes`.
      num_classes: the number of classes; by default the greatest label plus one.
      spec: the name of the whole in messages.

    Raises:
      UserError: a wrong type or shape, or a label that is not a class.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | Sequence[int] | None = None,
        *,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
        spec: str = "arrays",
    ):
        self.spec, self.num_classes, self.class_names = spec, None, None
        if class_names is not None:
            self.class_names = tuple(of_class(str(name)) for name in class_names)
            num_classes = len(self.class_names)
        self._images = np.asarray(images)
        self._check_images()
        self._labels = np.full(len(self), UNLABELLED)
        if labels is not None:
            self._labels = np.asarray(labels)
            self.num_classes = self._checked_classes(num_classes)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        return {"image": self._images[index], "label": int(self._labels[index])}

    def listing(self) -> Iterator[bytes]:
        """SHA-256 of the labels and, up to a GiB, of the images."""
        yield hashlib.sha256(self._labels.astype("<i8").tobytes()).digest()
        if self._images.nbytes <= _MOST_HASHED:
            yield hashlib.sha256(np.ascontiguousarray(self._images).data).digest()

    def _check_images(self) -> None:
        shape, dtype = self._images.shape, self._images.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
            raise UserError(
                f"{self.spec}: images must be uint8 [N, H, W, C] with C = 1 or 3, got "
                f"{dtype} {list(shape)}"
            )
        if not len(self):
            raise UserError(f"{self.spec}: there are no images")

    def _checked_classes(self, num_classes: int | None) -> int:
        """Checks the labels and returns the number of classes."""
        shape, dtype = self._labels.shape, self._labels.dtype
        if shape != (len(self),) or not np.issubdtype(dtype, np.integer):
            raise UserError(
                f"{self.spec}: labels must be integers of shape [{len(self)}], got "
                f"{dtype} {list(shape)}"
            )
        low, high = int(self._labels.min()), int(self._labels.max())
        num_classes = high + 1 if num_classes is None else num_classes
        if low < 0 or high >= num_classes:
            raise UserError(
                f"{self.spec}: labels must lie in 0..{num_classes - 1}, got "
                f"{low}..{high}"
            )
        return num_classes


def open_digits(split: str) -> ArraySource:
    """Digits, [N, 8, 8, 1]: the test split is a fifth of each class, drawn once."""
    if split not in ("train", "test"):
        raise UserError(
            f"digits has no split {split!r}: write digits:train or digits:test"
        )
    from sklearn.datasets import load_digits  # only this source needs it

    digits = load_digits()
    rng = np.random.default_rng(0)
    held_out = np.zeros(len(digits.target), bool)
    for label in range(10):
        members = rng.permutation(np.flatnonzero(digits.target == label))
        held_out[members[: round(len(members) / 5)]] = True
    chosen = held_out if split == "test" else ~held_out
    # Grey levels run from 0 to 16.
    images = np.rint(digits.images[chosen, :, :, None] * (255 / 16)).astype(np.uint8)
    names = [str(label) for label in range(10)]
    return ArraySource(
        images, digits.target[chosen], class_names=names, spec=f"digits:{split}"
    )


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
            # To the end: there gzip has the checksum of all.
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
