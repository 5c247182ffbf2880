"""Random access to labelled images: what a source is, and images in memory.

A source gives *encoded* images where it can: the threads or processes of the pipeline
decode them. Every source can be pickled: each worker process gets a copy.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol, TypedDict, runtime_checkable

import numpy as np

from atebm_jax.errors import UserError
from atebm_jax.names import of_class

UNLABELLED = -1

# Bytes; hashing so many takes a second or two.
_MOST_HASHED = 2**30


class Example(TypedDict):
    """image: encoded file as bytes, or uint8 [H, W, C]; label: -1 if unlabelled."""

    image: bytes | np.ndarray
    label: int


class Source(Protocol):
    """What the pipeline asks of a data set.

    num_classes and class_names are None for unlabelled images; `spec` is the string
    that `open_source` read.
    """

    spec: str
    num_classes: int | None
    class_names: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...

    def describe(self, index: int, /) -> str:
        """The name of image `index` in messages: a path, or `spec[index]`."""
        return f"{self.spec}[{index}]"


@runtime_checkable
class Listed(Protocol):
    """A source that describes all its images without reading them."""

    def listing(self) -> Iterator[bytes]:
        """Lines that differ for other images, and are the same in every place."""
        ...


def listing(source: Source) -> Iterator[bytes]:
    """The listing of a source; empty if it has none."""
    return source.listing() if isinstance(source, Listed) else iter(())


class ArraySource(Source):
    """Images in memory.

    Args:
      images: [N, H, W, C] uint8, C = 1 or 3, N > 0.
      labels: [N] integers from 0, or None for unlabelled images.
      class_names: a name for each class; its length sets `num_classes`.
      num_classes: the number of classes; by default the greatest label plus one.
      spec: the name of the whole in messages.

    Raises:
      UserError: another type or shape, or a label that is not a class.
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
