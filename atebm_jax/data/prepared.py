"""Prepared data sets: images resized once, in shards that are read at random."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python import array_record_data_source

from atebm_jax.data.sources import Example, Source
from atebm_jax.errors import UserError
from atebm_jax.names import check_utf8, of_class

INDEX = "index.json"
FORMAT = 1
_LABEL = struct.Struct("<i")


def pack(image: bytes, label: int) -> bytes:
    """A record: the label as a little-endian int32, then the encoded image."""
    return _LABEL.pack(label) + image


def shard_paths(root: Path, count: int) -> list[Path]:
    """The files of the `count` shards of a set."""
    names = (f"images-{k:05d}-of-{count:05d}.array_record" for k in range(count))
    return [root / name for name in names]


class _Shard(NamedTuple):
    """A shard with its number of records, so that the library need not count them."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class PreparedSource(Source):
    """What `python -m atebm_jax.data.prepare` has written.

    Args:
      path: the folder with `index.json` and the shards.

    Raises:
      UserError: there is none, or shards are missing.
    """

    def __init__(self, path: str):
        self.spec = f"prepared:{path}"
        root = Path(os.path.expanduser(path))
        check_utf8("the prepared set", root)
        index = read_index(root)
        self.class_names = tuple(map(of_class, index["class_names"] or ())) or None
        self.num_classes = len(self.class_names) if self.class_names else None
        self._digests = [str(shard["sha256"]) for shard in index["shards"]]
        counts = [shard["num_images"] for shard in index["shards"]]
        files = [
            _Shard(str(file), 0, count, count)
            for file, count in zip(shard_paths(root, len(counts)), counts)
            if count
        ]
        missing = [f.filename for f in files if not os.path.exists(f.filename)]
        if missing:
            raise UserError(
                f"{self.spec}: {len(missing)} shards are missing, {missing[0]} for "
                "one; prepare the set again into the same folder."
            )
        self._records: Any = []
        if files:
            self._records = array_record_data_source.ArrayRecordDataSource(files)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[int(index)]
        return {"image": record[_LABEL.size :], "label": _LABEL.unpack_from(record)[0]}

    def listing(self) -> Iterator[bytes]:
        """SHA-256 of every shard, as the index has it."""
        return (digest.encode() for digest in self._digests)


def read_index(root: Path) -> dict[str, Any]:
    """The description of a prepared set; a `UserError` if it is absent or damaged."""
    path = root / INDEX
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"prepared:{root}: {path} cannot be read ({error}); expected a folder that "
            "atebm_jax.data.prepare has finished."
        ) from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"prepared:{root}: {path} is of another format than {FORMAT}.")
    if not _is_whole(index):
        raise UserError(
            f"prepared:{root}: {path} is not as it was written: prepare the set again "
            "into the same folder."
        )
    return index


def _is_whole(index: dict[str, Any]) -> bool:
    """Whether an index has all entries that are read, each of its type."""
    names, shards = index.get("class_names", ""), index.get("shards")
    if not isinstance(names, list | None) or not isinstance(shards, list):
        return False
    return all(
        isinstance(counted, dict) and type(counted.get("num_images")) is int
        for counted in (index, *shards)
    ) and all(isinstance(shard.get("sha256"), str) for shard in shards)
