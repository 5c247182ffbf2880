"""Local paths: their names are never patterns; where links lead to."""

import glob
import os
from collections.abc import Iterator

from etils import epath


class LocalPath(type(epath.Path())):  # type: ignore[misc]
    """A path of `epath` whose `glob` does not read its own name as a pattern.

    The `glob` of epath joins path and pattern and reads brackets, stars and question
    marks of both. Below a folder named "[lab]" Orbax would not find the files that it
    has just written. What Orbax derives from this path (parents, children,
    epath.Path(path)) is of this class again.
    """

    def glob(self, pattern: str) -> Iterator[epath.Path]:
        """Files of any kind below this folder that match the pattern."""
        found = glob.iglob(os.path.join(glob.escape(os.fspath(self)), pattern))
        return (type(self)(name) for name in found)


def real(path: str | os.PathLike) -> LocalPath:
    """The path with its links followed; `~` is the home."""
    return LocalPath(os.path.realpath(os.path.expanduser(os.fspath(path))))


def is_device(path: str | os.PathLike) -> bool:
    """Whether something is there that is neither a file nor a folder.

    A pipe or `/dev/stdout` is written to, and not replaced by a file.
    """
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))
