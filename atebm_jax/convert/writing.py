"""Local files and folders that are whole or absent."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

from atebm_jax.errors import UserError
from atebm_jax.reporting import is_device, why_unwritable


@contextlib.contextmanager
def appears_whole(to: str | os.PathLike, flag: str = "--to") -> Iterator[str]:
    """A file or folder that appears when it is complete, or not at all.

    Args:
      to: local, with `~` for the home; folders above it are made. A file in its place
        or an empty folder gives way, nothing else: a device stays what it is. A link
        stays too, and what it leads to is made.
      flag: that gave it, for messages.

    Yields:
      The path to make it at; it is moved from there.

    Raises:
      UserError: it cannot be written, by whatever library that is said. Nothing is left
        behind then, nor after any other error.
    """
    given = os.path.expanduser(os.fspath(to))
    place = os.path.realpath(given)
    if is_device(given):
        raise UserError(
            f"{flag}={to} is neither a file nor a folder, and is left as it is: give "
            "another place."
        )
    folder, name = os.path.split(place)
    try:
        with contextlib.ExitStack() as undo:
            _make_folders(folder, undo)
            # Beside it, so that moving copies nothing.
            room = tempfile.mkdtemp(prefix=".making.", dir=folder)
            undo.callback(shutil.rmtree, room, ignore_errors=True)
            yield os.path.join(room, name)
            os.replace(os.path.join(room, name), place)
    except UserError:
        raise
    except Exception as error:
        reason = why_unwritable(error)
        if reason is None and isinstance(error, OSError):
            reason = error.strerror or str(error)
        if reason is None:
            raise
        raise UserError(
            f"{flag}={to} cannot be written ({reason}): nothing is left behind; make "
            "room or give another place, and give the same command again."
        ) from error


def _make_folders(folder: str, undo: contextlib.ExitStack) -> None:
    """Makes a folder and those above it; to be undone, those that stay empty."""
    if os.path.isdir(folder):
        return
    _make_folders(os.path.dirname(folder), undo)
    os.mkdir(folder)
    undo.callback(_remove_if_empty, folder)


def _remove_if_empty(folder: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(folder)
