"""Files that are whole or absent, on disks and in buckets."""

import contextlib
import errno
import importlib.util
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from atebm_jax.errors import UserError
from atebm_jax.local_path import absolute, in_bucket, is_device, local, real
from atebm_jax.names import check_utf8, writable

# What each kind of bucket needs: module -> package.
_FOR_BUCKETS = {
    "gs://": {"gcsfs": "gcsfs", "google.cloud.storage": "google-cloud-storage"},
    "s3://": {"s3fs": "s3fs"},
    "az://": {"adlfs": "adlfs"},
}
_EXTRAS = {"gs://": "'atebm_jax[gcs]'"}


def reached(path: str | os.PathLike) -> epath.Path:
    """As `local_path.absolute`; also refuses a bucket that cannot be reached from here.

    Raises:
      UserError: a cloud that is not known, or packages that are not installed.
    """
    found = absolute(path)
    scheme = os.fspath(found).partition("://")[0] + "://"
    needed = _FOR_BUCKETS.get(scheme, {})
    missing = [name for module, name in needed.items() if not _found(module)]
    if missing:
        raise UserError(
            f"{found} is in a bucket and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install {_EXTRAS.get(scheme, ' '.join(missing))}."
        )
    return found


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


# --- Writing ---


@contextlib.contextmanager
def replacing(path: epath.Path, *, shared: bool = False) -> Iterator[epath.Path]:
    """Makes a local file or folder elsewhere and then moves it to `path`.

    A killed process leaves the old `path` or the new one, whole. After an error nothing
    of the new one remains.

    Args:
      path: a file there, or an empty folder in place of a folder, is replaced.
      shared: another process may be making the same at this moment.

    Yields:
      Where to make it: in the same folder, so that moving copies nothing.
    """
    temporary = _temporary(path, shared)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(temporary)
        raise


def _temporary(path: epath.Path, shared: bool) -> epath.Path:
    mark = f".{os.getpid()}" if shared else ""
    return path.parent / f".{path.name}{mark}.tmp"


def probe(path: epath.Path, *, shared: bool = False) -> None:
    """Checks, before the work, that a file can be made; leaves everything as it is.

    Args:
      path, shared: as of `replacing`.

    Raises:
      OSError: it cannot.
    """
    temporary = _temporary(path, shared)
    temporary.write_bytes(b"probe")
    temporary.unlink()


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        epath.Path(path).rmtree()
    else:
        path.unlink(missing_ok=True)


def replace_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a file, whole or not at all, on a disk or in a bucket."""
    # In a bucket a file appears when it is complete; renaming would copy it.
    if in_bucket(path) or is_device(path):
        path.write_bytes(content)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def replace_text(path: epath.Path, text: str) -> None:
    """As `replace_bytes`, in UTF-8."""
    replace_bytes(path, writable(text).encode())


def write_json(path: epath.Path, content: Any, *, allow_nan: bool = True) -> None:
    """As `replace_bytes`.

    Raises:
      ValueError: a number is not finite and `allow_nan` is False.
    """
    replace_text(path, json.dumps(content, indent=2, allow_nan=allow_nan) + "\n")


def write_npz(
    path: epath.Path, arrays: Mapping[str, np.ndarray], *, compressed: bool = False
) -> None:
    """As `replace_bytes`; a local file takes no more memory than the arrays."""
    save = np.savez_compressed if compressed else np.savez
    if in_bucket(path):
        stream = io.BytesIO()
        save(stream, allow_pickle=False, **arrays)
        path.write_bytes(stream.getvalue())
        return
    with replacing(path) as temporary, temporary.open("wb") as file:
        save(file, allow_pickle=False, **arrays)


def read_npz(
    path: epath.Path, names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """The arrays of a file as of `write_npz`, all or those of some names.

    Raises:
      OSError: it is not there, damaged, or holds no such arrays.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in names or stored.files}
    except OSError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise OSError(f"{type(error).__name__}: {error}") from error


def check_new_folder(flag: str, to: str | os.PathLike) -> None:
    """Refuses a folder that cannot be written, or is there and not empty.

    Args:
      flag: the flag that gave it, for messages.
      to: local, with `~` for the home.

    Raises:
      UserError: something is there, or it is no local path.
    """
    check_utf8(flag, to)
    folder = absolute(local(flag, to))
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{flag}={to} is not empty: give a new folder.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag}={to} is no folder: give a new folder.")


@contextlib.contextmanager
def appears_whole(to: str | os.PathLike, flag: str = "--to") -> Iterator[str]:
    """A file or folder that appears when it is complete, or not at all.

    Args:
      to: local, with `~` for the home; folders above it are made. A file or an empty
        folder there is replaced, a link is followed, a device is refused.
      flag: the flag that gave it, for messages.

    Yields:
      The path to make it at; it is moved from there.

    Raises:
      UserError: it cannot be written, whatever library says so. After this and any
        other error nothing remains.
    """
    place = real(local(flag, to))
    if is_device(place):
        raise UserError(
            f"{flag}={to} is neither a file nor a folder, and is left as it is: give "
            "another place."
        )
    made = [folder for folder in place.parents if not folder.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place, shared=True) as temporary:
            _remove(temporary)  # of a killed process that had the same number
            yield os.fspath(temporary)
    except UserError:
        raise
    except Exception as error:
        reason = _why_unwritable(error)
        if reason is None and isinstance(error, OSError):
            reason = error.strerror or str(error)
        if reason is None:
            raise
        raise UserError(
            f"{flag}={to} cannot be written ({reason}): nothing is left behind; make "
            "room or give another place, and give the same command again."
        ) from error
    finally:
        for folder in made:  # from the innermost one up; only empty ones go
            with contextlib.suppress(OSError):
                os.rmdir(folder)


# --- What cannot be written ---


@contextlib.contextmanager
def writing(what: str | os.PathLike, remedy: str = "") -> Iterator[None]:
    """Says in one sentence that a file or folder cannot be written.

    Args:
      what: the kind of file or folder, and its name.
      remedy: another sentence.

    Raises:
      UserError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        reason = "it is no folder" if isinstance(error, FileExistsError) else error
        sentence = f"{os.fspath(what)} cannot be written: {reason}."
        raise UserError(f"{sentence} {remedy}".rstrip()) from error


@contextlib.contextmanager
def told_plainly(
    folder: str | os.PathLike,
    what: str = "workdir",
    then: str = "from the last checkpoint",
) -> Iterator[None]:
    """Says in one sentence that a folder cannot be written any more.

    Args:
      folder: a job's workdir, or another one that the same command goes on with.
      what: the kind of folder.
      then: where the same command goes on.

    Raises:
      UserError: in place of an error that says so, from whatever library.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _why_unwritable(error)
        if reason is None:
            raise
        raise UserError(
            f"{what} {os.fspath(folder)} cannot be written any more ({reason}): once "
            f"it can, the same command goes on {then}."
        ) from error


# Errors of a file system that is full or read-only.
_UNWRITABLE = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EFBIG: "File too large",
    errno.EROFS: "Read-only file system",  # also a disk that fails, under Linux
}


def _why_unwritable(error: BaseException | None) -> str | None:
    """The reason, if an error or one of its causes is of a full or read-only disk."""
    while error is not None:
        for number, text in _UNWRITABLE.items():
            if getattr(error, "errno", None) == number or text in str(error):
                return text
        error = error.__cause__ or error.__context__
    return None
