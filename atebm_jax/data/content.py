"""A description of a set of images that shows whether it has changed.

A stopped command must go on with the same images. A description has the number of
images, the names of the classes, and a digest of a listing of all images (for a folder:
classes, paths and sizes) and of the bytes of a few. Images are not decoded.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from atebm_jax.data.sources import Source, listing
from atebm_jax.errors import UserError

#: What sources raise if an image cannot be read.
UNREADABLE = (OSError, ValueError, RuntimeError, LookupError)
# Images whose bytes are read, evenly spread over the source.
_NUM_READ = 256


def describe(source: Source) -> dict[str, Any]:
    """Number of images, names of classes and the digest, as plain JSON.

    It does not depend on where the images lie. A changed file is noticed if its path,
    class or size has changed, or if it is among the 256 that are read.
    """
    digest = hashlib.sha256()
    for line in listing(source):
        digest.update(line + b"\n")
    for part in _bytes_of_some(source):
        digest.update(hashlib.sha256(part).digest())
    names = source.class_names
    return {
        "num_images": len(source),
        "class_names": None if names is None else list(names),
        "content": digest.hexdigest(),
    }


def check(
    what: str,
    before: Any,
    now: Mapping[str, Any],
    *,
    since: str,
    remedy: str,
    by_place: bool = False,
) -> None:
    """Refuses images that differ from those that a command began with.

    Args:
      what: which images, for messages: "config.data.train=folder:PATH".
      before: as of `describe`; None where an earlier version kept nothing.
      now: the same of what there is now.
      since: when `before` was made, for messages: "workdir W was begun".
      remedy: other than bringing the images back: "give another --workdir".
      by_place: the names of the classes may be others.

    Raises:
      UserError: says what has changed.
    """
    if not isinstance(before, Mapping):
        return
    then, number = before.get("num_images"), now["num_images"]
    parts = [f"{then} images then, {number} now"] if then != number else []
    if not by_place:
        parts += _names_difference(before.get("class_names"), now["class_names"])
    if not parts and before.get("content") != now["content"]:
        parts.append(
            f"{number} images then and now, but not the same ones (their classes, "
            "paths, sizes or bytes differ)"
        )
    if parts:
        raise UserError(
            f"{what} has changed since {since}: {', '.join(parts)}. Bring the images "
            f"back, or {remedy}."
        )


def _names_difference(
    before: Sequence[str] | None, now: Sequence[str] | None
) -> list[str]:
    """How the names of the classes differ; empty if they do not."""
    old, new = before or [], now or []
    if len(old) != len(new):
        gone = [f" ({name!r} has gone)" for name in old if name not in new]
        come = [f" ({name!r} is new)" for name in new if name not in old]
        return [f"{len(old)} classes then, {len(new)} now{(gone + come + [''])[0]}"]
    for place, (then, name) in enumerate(zip(old, new)):
        if then != name:
            return [f"class {place} was {then!r} then and is {name!r} now"]
    return []


def _bytes_of_some(source: Source) -> Iterator[bytes]:
    number = min(_NUM_READ, len(source))
    for position in range(number):
        try:
            example = source[position * len(source) // number]
        except UNREADABLE:  # it is an error only where the image is needed
            yield b"cannot be read"
            continue
        yield str(example["label"]).encode()
        image = example["image"]
        if isinstance(image, np.ndarray):
            yield f"{image.shape} {image.dtype}".encode()
            image = image.tobytes()
        yield image
