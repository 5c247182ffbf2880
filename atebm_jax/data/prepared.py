"""Prepared data sets: images resized once, in shards that are read at random."""

import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from array_record.python import array_record_data_source

from atebm_jax.data.sources import Example
from atebm_jax.errors import UserError
from atebm_jax.names import check_utf8

INDEX = "index.json"
FORMAT = 1
_LABEL = struct.Struct("<i")


def pack(image: bytes, label: int) -> bytes:
    """A record: the label as a little-endian int32, then the encoded image."""
    return _LABEL.pack(label) + image


def unpack(record: bytes) -> Example:
    """Undoes `pack`."""
    return {"image": record[_LABEL.size :], "label": _LABEL.unpack_from(record)[0]}


def shard_name(index: int, count: int) -> str:
    """File name of a shard."""
    return f"images-{index:05d}-of-{count:05d}.array_record"


class PreparedSource:
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
        self.class_names = tuple(index["class_names"] or ()) or None
        self.num_classes = len(self.class_names) if self.class_names else None
        shards = index["shards"]
        counts = {
            str(root / shard_name(i, len(shards))): shard["num_images"]
            for i, shard in enumerate(shards)
            if shard["num_images"]
        }
        missing = [path for path in counts if not os.path.exists(path)]
        if missing:
            raise UserError(
                f"{self.spec}: {len(missing)} shards are missing, {missing[0]} for "
                "one; prepare the set again into the same folder."
            )
        self._digests = [str(shard["sha256"]) for shard in shards]
        # With its count in brackets, no shard is opened before it is read.
        paths = [f"{path}[0:{count}]" for path, count in counts.items()]
        self._records: Sequence[bytes] = (
            array_record_data_source.ArrayRecordDataSource(paths) if paths else []
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        return unpack(self._records[int(index)])

    def describe(self, index: int) -> str:
        return f"{self.spec}[{index}]"

    def listing(self) -> Iterator[bytes]:
        """SHA-256 of every shard, as the index has it."""
        return (digest.encode() for digest in self._digests)


def read_index(root: Path) -> dict[str, Any]:
    """The description of a prepared set.

    Raises:
      UserError: it is absent or damaged.
    """
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
    return index
