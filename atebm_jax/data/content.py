"""A description of a set of images that shows whether it has changed.

A stopped command must go on with the same images. Compared are the number of images,
the names of the classes, and a digest. The digest is of a listing of all images (for a
folder: classes, paths and sizes) and of the bytes of a few. Images are not decoded.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from atebm_jax.data.sources import Source, listing
from atebm_jax.errors import UserError

#: What sources raise of an image that cannot be read, those of records among them.
UNREADABLE = (OSError, ValueError, RuntimeError, LookupError)
# Images whose bytes are read, evenly spread over the source.
_NUM_READ = 256


def describe(source: Source) -> dict[str, Any]:
    """Number of images, names of classes and the digest, as plain JSON.

    The same wherever the images lie. A changed file is noticed if its path, class or
    size has changed, or if it is among the 256 that are read.
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
    if changed := _difference(before, now, by_place):
        raise UserError(
            f"{what} has changed since {since}: {changed}. Bring the images back, or "
            f"{remedy}."
        )


def _difference(
    before: Mapping[str, Any], now: Mapping[str, Any], by_place: bool
) -> str:
    parts = []
    if before.get("num_images") != now["num_images"]:
        parts.append(f"{before.get('num_images')} images then, {now['num_images']} now")
    if not by_place and before.get("class_names") != now["class_names"]:
        old, new = before.get("class_names") or [], now["class_names"] or []
        parts.append(_names_difference(old, new))
    if not parts and before.get("content") != now["content"]:
        parts.append(
            f"{now['num_images']} images then and now, but not the same ones (their "
            "classes, paths, sizes or bytes differ)"
        )
    return ", ".join(parts)


def _names_difference(old: list[str], new: list[str]) -> str:
    if len(old) != len(new):
        gone = [name for name in old if name not in new]
        come = [name for name in new if name not in old]
        first = f" ({gone[0]!r} has gone)" if gone else f" ({come[0]!r} is new)"
        return f"{len(old)} classes then, {len(new)} now{first if gone or come else ''}"
    place = next(k for k, pair in enumerate(zip(old, new)) if pair[0] != pair[1])
    return f"class {place} was {old[place]!r} then and is {new[place]!r} now"


def _bytes_of_some(source: Source) -> Iterator[bytes]:
    number = min(_NUM_READ, len(source))
    for position in range(number):
        try:
            example = source[position * len(source) // number]
        except UNREADABLE:  # an error only where the image is needed
            yield b"cannot be read"
            continue
        yield str(example["label"]).encode()
        image = example["image"]
        if isinstance(image, np.ndarray):
            yield f"{image.shape} {image.dtype}".encode()
            image = image.tobytes()
        yield image
