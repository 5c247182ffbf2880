"""Image files below a folder, one sub-folder for each class."""

import collections
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from atebm_jax.data import decoding
from atebm_jax.data.sources import UNLABELLED, Example, Source
from atebm_jax.errors import UserError
from atebm_jax.names import of_class, printable

_log = logging.getLogger(__name__)

# Images whose sizes are compared, and threads that ask for them.
_MOST_SIZES, _THREADS = 2**16, 16

_NUMBER = re.compile(r"-?\d+(\.\d+)?")

# Kinds of entries that are used.
_FOLDER, _IMAGE = "folder", "image"

# Folders that network disks, archives and systems put beside images.
_NOT_CLASSES = frozenset(
    {
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
        *("__macosx", "temporary items", "network trash folder", "lost+found"),
        *("$recycle.bin", "system volume information", "__pycache__"),
    }
)


class FolderSource(Source):
    """Image files below a folder.

    With sub-folders, each of them is a class: labels go by sorted name, and images may
    lie at any depth. Without, the images are unlabelled. The extension of a file tells
    whether it is an image. Other files are counted in a warning, as are folders that
    systems put among images (`@eaDir`, `__MACOSX`) and links to a folder above them.
    Names that begin with a dot are ignored.

    Raises:
      UserError: a folder is missing or cannot be read, it holds no image, has a class
        without images, or mixes images with class folders.
    """

    def __init__(self, path: str):
        self.spec = f"folder:{printable(path)}"
        self._root = os.path.expanduser(path)
        if not path or not os.path.isdir(self._root):
            raise UserError(
                f"{self.spec}: there is no such folder; give the folder that holds "
                "the images, or one sub-folder for each class"
            )
        passed_over: collections.Counter[str] = collections.Counter()
        tree = _walk(self._root, passed_over)
        _, folders, flat = next(tree)
        if folders and flat:
            raise UserError(
                f"{self.spec}: both images ({printable(flat[0])}, ...) and class "
                f"folders ({printable(folders[0])}, ...) found; move the images into "
                "class folders, or away"
            )
        # Paths below the root are short: a million of them are sent to each worker.
        self._paths = flat
        labels = [UNLABELLED] * len(flat)
        label_of = {name: label for label, name in enumerate(folders)}
        for folder, _, images in tree:
            self._paths += [os.path.join(folder, name) for name in images]
            labels += [label_of[folder.partition(os.sep)[0]]] * len(images)
        self._labels = np.array(labels, np.int32)
        self.class_names = tuple(map(of_class, folders)) or None
        self.num_classes = len(folders) or None
        self._warn_of_passed_over(passed_over)
        self._check_not_empty()
        self._warn_of_numbers()

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        image = Path(self.path(index)).read_bytes()
        return {"image": image, "label": int(self._labels[index])}

    def path(self, index: int) -> str:
        """The path of image `index`, for opening it; `describe` is for messages."""
        return os.path.join(self._root, self._paths[index])

    def describe(self, index: int) -> str:
        return printable(self.path(index))

    def listing(self) -> Iterator[bytes]:
        """Class and path below its folder of every image, and sizes of many.

        Sizes of `_MOST_SIZES` images, evenly spread: on the disks of a cluster each
        takes milliseconds.
        """
        for path, label in zip(self._paths, self._labels.tolist(), strict=True):
            # Without the class folder: its name is compared with those of the classes.
            below = path if label == UNLABELLED else path.partition(os.sep)[2]
            yield b"%d %s" % (label, os.fsencode(below))
        number = min(_MOST_SIZES, len(self))
        places = [k * len(self) // number for k in range(number)]
        with ThreadPoolExecutor(_THREADS) as threads:
            for size in threads.map(self._size, places):
                yield b"%d" % size

    def _size(self, index: int) -> int:
        try:
            return os.stat(self.path(index)).st_size
        except OSError:
            return -1

    def _check_not_empty(self) -> None:
        if not self._paths:
            raise UserError(
                f"{self.spec}: no images found (looked for "
                f"{', '.join(sorted(decoding.extensions()))}, in class folders too)"
            )
        names, present = self.class_names or (), set(self._labels.tolist())
        empty = [name for label, name in enumerate(names) if label not in present]
        if empty:
            raise UserError(
                f"{self.spec}: {len(empty)} of {len(names)} class folders hold no "
                f"image ({', '.join(empty[:5])}); remove them, for they would count "
                "as classes"
            )

    def _warn_of_passed_over(self, passed_over: collections.Counter[str]) -> None:
        if passed_over:
            kinds = [f"{kind}: {count}" for kind, count in passed_over.most_common(5)]
            more = f" and {len(passed_over) - 5} more kinds" * (len(passed_over) > 5)
            _log.warning(
                "%s: %d files and folders that are no images are passed over (%s%s)",
                *(self.spec, passed_over.total(), ", ".join(kinds), more),
            )

    def _warn_of_numbers(self) -> None:
        """Warns if folders "1", "10", "2" become classes 0, 1 and 2."""
        names = self.class_names or ()
        if not all(map(_NUMBER.fullmatch, names)):
            return
        ascending = enumerate(sorted(names, key=float))
        wrong = [k for k, name in ascending if name != names[k]]
        if wrong:
            place, digits = wrong[0], len(str(len(names)))
            _log.warning(
                "%s: the class folders are numbers sorted as text (%s, ...): class %d "
                "is the folder %s. Leading zeros (%s) keep whole numbers in order",
                *(self.spec, ", ".join(names[:4]), place, names[place]),
                str(place).zfill(digits),
            )


def check_outside(flag: str, out: str | os.PathLike, source: str | Path) -> None:
    """Refuses to write into a folder that is read: the next command would read it too.

    Args:
      flag: the flag that gave it, for messages.
      out: where a command writes.
      source: a folder, `folder:PATH`; files and data sets are in no danger.

    Raises:
      UserError: `out` is the folder or lies in it.
    """
    folder = Path(os.path.expanduser(str(source).removeprefix("folder:")))
    # `os.path` takes loops of links and names that are too long; `Path` does not.
    inside = Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder))
    if os.path.isdir(folder) and inside:
        raise UserError(
            f"{flag}={out} lies in {folder}, whose images are read: give a folder "
            "outside of it."
        )


def _walk(
    root: str, passed_over: collections.Counter[str]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Every folder from the root down: its path below the root, sub-folders, images.

    The order is fixed: a folder before its sub-folders, names sorted.

    Args:
      root: the folder to begin with; its own path below the root is "".
      passed_over: counts what is neither an image nor a folder with images, by kind.

    Raises:
      UserError: a folder cannot be read.
    """
    # Each with the real paths of the folders above it.
    pending: list[tuple[str, frozenset[str]]] = [("", frozenset())]
    while pending:
        folder, above = pending.pop()
        path = os.path.join(root, folder)
        above |= {os.path.realpath(path)}
        names: dict[str, list[str]] = {_FOLDER: [], _IMAGE: []}
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    kind = _kind(entry, above)
                    if kind in names:
                        names[kind].append(entry.name)
                    elif kind:
                        passed_over[kind] += 1
        except OSError as error:
            raise UserError(
                f"folder:{printable(root)}: {printable(path)} cannot be read "
                f"({error.strerror}): make it readable, or move it away"
            ) from error
        folders = sorted(names[_FOLDER])
        yield folder, folders, sorted(names[_IMAGE])
        pending += [(os.path.join(folder, name), above) for name in reversed(folders)]


def _kind(entry: os.DirEntry, above: frozenset[str]) -> str:
    """_FOLDER, _IMAGE, "" if hidden, or a name for an entry that is passed over."""
    ending = os.path.splitext(entry.name)[1].lower()
    if entry.name.startswith("."):
        return ""
    if _is_folder(entry):
        if entry.name.lower() in _NOT_CLASSES:
            return f"folder {entry.name}"
        if entry.is_symlink() and os.path.realpath(entry.path) in above:  # a loop
            return f"link {printable(entry.name)} to above it"
        return _FOLDER
    # A pipe would block its reader; a broken link counts as a broken image.
    if ending in decoding.extensions() and (entry.is_symlink() or entry.is_file()):
        return _IMAGE
    return printable(ending) or "no ending"


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
