"""Random access to labelled images: what a source is.

A source gives *encoded* images where it can: the threads or processes of the pipeline
decode them. Every source can be pickled: each worker process gets a copy.
"""

from collections.abc import Iterator
from typing import Protocol, TypedDict

import numpy as np

UNLABELLED = -1


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


def listing(source: Source) -> Iterator[bytes]:
    """Lines that differ for other images, and are the same in every place.

    They are those of `source.listing()`, which reads no image; none without one.
    """
    return source.listing() if hasattr(source, "listing") else iter(())
