"""SHA-256 of every file of a checkpoint: written with it, checked on reading.

The list has the format of `sha256sum`, so that `cd STEP; sha256sum -c CHECKSUMS.sha256`
checks a step without this package. Its first line is the digest of the others.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

FILE = "CHECKSUMS.sha256"

# Orbax writes these after the list. A checkpoint reads the same without them.
_NOT_LISTED = {FILE, "_CHECKPOINT_METADATA", "commit_success.txt"}

_HEADER = "# sha256 of the lines below: "
_CHUNK = 1 << 20
_THREADS = 4


def write(folder: epath.Path) -> None:
    """Lists the files of a checkpoint's step, which must not change any more."""
    names = sorted(name for name in _files(folder) if name not in _NOT_LISTED)
    with ThreadPoolExecutor(_THREADS) as threads:
        digests = threads.map(lambda name: _digest(folder / name), names)
        pairs = zip(digests, names, strict=True)
        lines = "".join(f"{digest}  {name}\n" for digest, name in pairs)
    (folder / FILE).write_text(f"{_HEADER}{_sha256(lines)}\n{lines}")


def exist(folder: epath.Path) -> bool:
    """Whether a folder has a list; checkpoints of earlier versions have none."""
    return (folder / FILE).exists()


def damage(folder: epath.Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a folder's files, by the list; None if nothing is.

    Args:
      folder: one step of a checkpoint; one without a list passes.
      part: which of `parts` equal shares of the files to read.
      parts: how many processes share the reading.

    Returns:
      A phrase that names the first bad file, "state/d/0 is empty".
    """
    if not exist(folder):
        return None
    try:
        text = (folder / FILE).read_bytes().decode(errors="replace")
    except OSError as error:
        return f"{FILE} cannot be read ({error.strerror or error})"
    header, _, lines = text.partition("\n")
    if header != f"{_HEADER}{_sha256(lines)}":
        return f"{FILE} is incomplete or was altered"
    listed = [line.split("  ", 1) for line in lines.splitlines()][part::parts]
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda pair: _fault(folder / pair[1], pair[0]), listed)
        faults = zip(listed, found, strict=True)
        return next((f"{name} {fault}" for (_, name), fault in faults if fault), None)


def _fault(path: epath.Path, listed: str) -> str | None:
    """What is wrong with one file, None if nothing is."""
    try:
        digest = _digest(path)
    except OSError as error:
        return f"cannot be read ({error})" if path.exists() else "is missing"
    if digest == listed:
        return None
    if digest == _sha256(""):
        return "is empty"
    return "was truncated or altered (its SHA-256 is not the one it was saved with)"


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        else:
            yield f"{prefix}{path.name}"


def _digest(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
