"""Random access to labelled images: TFDS, image folders, digits, arrays.

A source hands out *encoded* images where it can, so that decoding happens in the
threads or processes of the pipeline, and can name each image for messages. Every
source can be pickled: worker processes receive a copy.
"""

import collections
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np

from atebm_jax.data import decoding
from atebm_jax.errors import UserError
from atebm_jax.names import check_utf8, of_class, printable
from atebm_jax.storage import reached

_log = logging.getLogger(__name__)

UNLABELLED = -1

#: What the spec of a data set begins with.
KINDS = ("digits:", "tfds:", "cifar:", "folder:", "prepared:")

_EXAMPLES = (
    "digits:train, tfds:cifar10:train, tfds:cifar10:test[:1000], "
    "cifar:cifar-10-binary.tar.gz:train, folder:/path/to/class/folders"
)
_DIGITS_SPLIT_SEED = 0
# The split is what follows the last colon outside of brackets.
_TFDS_SPEC = re.compile(r"(?P<name>.+):(?P<split>(?:[^:\[\]]|\[[^\[\]]*\])+)")


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
        """A name of image `index` for messages: a path, or `spec[index]`."""
        ...


@runtime_checkable
class Listed(Protocol):
    """A source that can tell of all its images without reading them."""

    def listing(self) -> Iterator[bytes]:
        """Lines that are others where the images are, wherever they lie."""
        ...


def listing(source: Source) -> Iterator[bytes]:
    """What a source tells of its images without reading them; nothing if it cannot."""
    return source.listing() if isinstance(source, Listed) else iter(())


def open_source(spec: str, data_dir: str = "") -> Source:
    """Opens the data set that `spec` names.

    Args:
      spec: `digits:train` or `digits:test` (scikit-learn's 8x8 digits),
        `cifar:PATH:SPLIT` (the authors' archive, binary version),
        `tfds:NAME:SPLIT` (a prepared ArrayRecord data set; NAME may carry a
        configuration and a version, SPLIT a slice), `folder:PATH` (images in one
        folder for each class, or unlabelled images without class folders), or
        `prepared:PATH` (what `atebm_jax.data.prepare` has written).
      data_dir: where TFDS data sets lie; empty for $TFDS_DATA_DIR or
        ~/tensorflow_datasets. Other kinds ignore it.

    Raises:
      UserError: an unknown kind, or data that is absent or of another kind.
    """
    kind, _, rest = spec.partition(":")
    if kind == "digits":
        return _digits(rest)
    if kind == "tfds":
        return TfdsSource(spec, data_dir)
    if kind == "folder":
        return FolderSource(rest)
    if kind == "cifar":
        from atebm_jax.data.cifar import open_cifar  # it rests on this file

        return open_cifar(rest, spec)
    if kind == "prepared":
        # Imported here, because it rests on this file.
        from atebm_jax.data.prepared import PreparedSource

        return PreparedSource(rest)
    raise UserError(
        f"unknown data source {spec!r}: it must begin with one of {', '.join(KINDS)}, "
        f"for example {_EXAMPLES}"
    )


class ArraySource:
    """Images in memory.

    Args:
      images: [N, H, W, C] uint8, C = 1 or 3, N > 0.
      labels: [N] integers from 0, or None for unlabelled images.
      class_names: a name for each class; its length sets `num_classes`.
      num_classes: the number of classes; by default the greatest label plus one.
      spec: the name of the whole in messages.

    Raises:
      UserError: another type or shape, or a label that is not a class.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | Sequence[int] | None = None,
        *,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
        spec: str = "arrays",
    ):
        images = np.asarray(images)
        _check_images(images, spec)
        self.spec = spec
        self.class_names: tuple[str, ...] | None = None
        if class_names is not None:
            self.class_names = tuple(of_class(str(name)) for name in class_names)
        self.num_classes: int | None = None
        self._images = images
        self._labels = np.full(len(images), UNLABELLED)
        if labels is not None:
            self._labels = np.asarray(labels)
            if self.class_names is not None:
                num_classes = len(self.class_names)
            self.num_classes = _check_labels(
                self._labels, len(images), num_classes, spec
            )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        return {"image": self._images[index], "label": int(self._labels[index])}

    def describe(self, index: int) -> str:
        return f"{self.spec}[{index}]"

    def listing(self) -> Iterator[bytes]:
        """SHA-256 of the labels and, where they take a GiB at most, of the images."""
        yield hashlib.sha256(self._labels.astype("<i8").tobytes()).digest()
        if self._images.nbytes <= _MOST_HASHED:
            yield hashlib.sha256(np.ascontiguousarray(self._images).data).digest()


def _check_images(images: np.ndarray, spec: str) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise UserError(
            f"{spec}: images must be uint8 [N, H, W, C] with C = 1 or 3, got "
            f"{images.dtype} {list(images.shape)}"
        )
    if len(images) == 0:
        raise UserError(f"{spec}: there are no images")


def _check_labels(
    labels: np.ndarray, num_images: int, num_classes: int | None, spec: str
) -> int:
    """Checks labels and returns the number of classes."""
    if labels.shape != (num_images,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{spec}: labels must be integers of shape [{num_images}], got "
            f"{labels.dtype} {list(labels.shape)}"
        )
    low, high = int(labels.min()), int(labels.max())
    num_classes = high + 1 if num_classes is None else num_classes
    if low < 0 or high >= num_classes:
        raise UserError(
            f"{spec}: labels must lie in 0..{num_classes - 1}, got {low}..{high}"
        )
    return num_classes


def _digits(split: str) -> ArraySource:
    """Digits, [N, 8, 8, 1]: the test split is a fifth of each class, drawn once."""
    if split not in ("train", "test"):
        raise UserError(
            f"digits has no split {split!r}: write digits:train or digits:test"
        )
    from sklearn.datasets import load_digits  # only this source needs it

    digits = load_digits()
    rng = np.random.default_rng(_DIGITS_SPLIT_SEED)
    held_out = np.zeros(len(digits.target), bool)
    for label in range(10):
        members = rng.permutation(np.flatnonzero(digits.target == label))
        held_out[members[: round(len(members) / 5)]] = True
    chosen = held_out if split == "test" else ~held_out
    # Grey levels run from 0 to 16.
    images = np.rint(digits.images[chosen, :, :, None] * (255 / 16)).astype(np.uint8)
    names = [str(label) for label in range(10)]
    return ArraySource(
        images, digits.target[chosen], class_names=names, spec=f"digits:{split}"
    )


class FolderSource:
    """Image files below a folder.

    With sub-folders each of them is a class (labels by sorted name, images at any
    depth); without, the images are unlabelled. Files are told to be images by their
    extension; how many others there are is said. Names beginning with a dot, folders
    that systems put among images (`@eaDir`, `__MACOSX`) and links to a folder above
    them are passed over.

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
        tree = _Tree(self._root)
        folders, flat = tree.top()
        if folders and flat:
            raise UserError(
                f"{self.spec}: both images ({printable(flat[0])}, ...) and class "
                f"folders ({printable(folders[0])}, ...) found; move the images into "
                "class folders, or away"
            )
        # Paths below the root: a million of them travel to each worker.
        self._paths = list(flat)
        labels = [UNLABELLED] * len(flat)
        for label, folder in enumerate(folders):
            paths = tree.below(folder)
            self._paths += paths
            labels += [label] * len(paths)
        self._labels = np.array(labels, np.int32)
        self.class_names = tuple(map(of_class, folders)) or None
        self.num_classes = len(folders) or None
        _say_passed_over(self.spec, tree.passed_over)
        self._check_not_empty(self.class_names or ())
        _warn_of_numbers(self.spec, self.class_names or ())

    def _check_not_empty(self, folders: Sequence[str]) -> None:
        if not self._paths:
            raise UserError(
                f"{self.spec}: no images found (looked for "
                f"{', '.join(sorted(decoding.extensions()))}, in class folders too)"
            )
        present = set(self._labels.tolist())
        empty = [name for label, name in enumerate(folders) if label not in present]
        if empty:
            raise UserError(
                f"{self.spec}: {len(empty)} of {len(folders)} class folders hold no "
                f"image ({', '.join(empty[:5])}); remove them, for they would count "
                "as classes"
            )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        image = Path(self.path(index)).read_bytes()
        return {"image": image, "label": int(self._labels[index])}

    def path(self, index: int) -> str:
        """Where image `index` is; `describe` is for people."""
        return os.path.join(self._root, self._paths[index])

    def describe(self, index: int) -> str:
        return printable(self.path(index))

    def listing(self) -> Iterator[bytes]:
        """Class and path below its folder of every image, and sizes of many.

        Sizes of `_MOST_SIZES` images evenly spread: on the disks of a cluster each
        takes milliseconds.
        """
        for path, label in zip(self._paths, self._labels.tolist(), strict=True):
            # Without the class folder's name, which is compared as the class's.
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


# Of images in memory, bytes that are hashed in a second or two.
_MOST_HASHED = 2**30
# Images of a folder whose sizes are looked at, and how many at once.
_MOST_SIZES = 2**16
_THREADS = 16

# Put beside images by network disks, archives and systems, with small images in some.
_NOT_CLASSES = frozenset(
    {
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
        *("__macosx", "temporary items", "network trash folder", "lost+found"),
        *("$recycle.bin", "system volume information", "__pycache__"),
    }
)

# A folder, whatever its paths: device and number.
_Identity = tuple[int, int]


class _Tree:
    """The folders and image files below a root.

    Attributes:
      passed_over: what is neither, by ending or by name of the folder.
    """

    def __init__(self, root: str):
        self.passed_over: collections.Counter[str] = collections.Counter()
        self._root = root

    def top(self) -> tuple[list[str], list[str]]:
        """Sorted names of the sub-folders and of the image files in the root."""
        return self._scan("", frozenset((self._identity(""),)))

    def below(self, folder: str) -> list[str]:
        """Paths from the root of all images below a folder in it, in a fixed order."""
        paths: list[str] = []
        pending = [(folder, frozenset((self._identity(""),)))]
        while pending:
            folder, above = pending.pop()
            above = above | {self._identity(folder)}
            folders, images = self._scan(folder, above)
            paths += [os.path.join(folder, name) for name in images]
            pending += [(os.path.join(folder, name), above) for name in folders[::-1]]
        return paths

    def _scan(
        self, folder: str, above: frozenset[_Identity]
    ) -> tuple[list[str], list[str]]:
        """Sorted names of the sub-folders and of the image files in a folder."""
        folders, images = [], []
        endings = decoding.extensions()
        try:
            with os.scandir(os.path.join(self._root, folder)) as entries:
                for entry in entries:
                    ending = os.path.splitext(entry.name)[1].lower()
                    if entry.name.startswith("."):
                        continue
                    if _is_folder(entry):
                        if self._is_to_be_read(entry, above):
                            folders.append(entry.name)
                    # A pipe would be waited for; a link to nowhere is a bad image.
                    elif ending in endings and (entry.is_symlink() or entry.is_file()):
                        images.append(entry.name)
                    else:
                        self.passed_over[printable(ending) or "no ending"] += 1
        except OSError as error:
            raise self._unreadable(folder, error) from error
        return sorted(folders), sorted(images)

    def _is_to_be_read(self, entry: os.DirEntry, above: frozenset[_Identity]) -> bool:
        if entry.name.lower() in _NOT_CLASSES:
            self.passed_over[f"folder {entry.name}"] += 1
            return False
        if entry.is_symlink():
            status = entry.stat()
            # It would lead round and round.
            if (status.st_dev, status.st_ino) in above:
                self.passed_over[f"link {printable(entry.name)} to above it"] += 1
                return False
        return True

    def _identity(self, folder: str) -> _Identity:
        try:
            status = os.stat(os.path.join(self._root, folder))
        except OSError as error:
            raise self._unreadable(folder, error) from error
        return status.st_dev, status.st_ino

    def _unreadable(self, folder: str, error: OSError) -> UserError:
        path = printable(os.path.join(self._root, folder))
        return UserError(
            f"folder:{printable(self._root)}: {path} cannot be read "
            f"({error.strerror}): make it readable, or move it away"
        )


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _say_passed_over(spec: str, passed_over: collections.Counter[str]) -> None:
    if passed_over:
        kinds = [f"{kind}: {count}" for kind, count in passed_over.most_common(5)]
        more = f" and {len(passed_over) - 5} more kinds" * (len(passed_over) > 5)
        _log.warning(
            "%s: %d files and folders that are no images are passed over (%s%s)",
            spec,
            passed_over.total(),
            ", ".join(kinds),
            more,
        )


def _warn_of_numbers(spec: str, names: Sequence[str]) -> None:
    """Says that folders "1", "10", "2" are classes 0, 1 and 2."""
    if not all(name.isdecimal() for name in names):
        return
    wrong = [k for k, name in enumerate(sorted(names, key=int)) if name != names[k]]
    if wrong:
        _log.warning(
            "%s: the class folders are numbers in the order of their letters (%s, "
            "...): class %d is the folder %s. Leading zeros (%s) keep their order",
            spec,
            ", ".join(names[:4]),
            wrong[0],
            names[wrong[0]],
            str(wrong[0]).zfill(len(str(len(names)))),
        )


class TfdsSource:
    """A prepared ArrayRecord data set, read without TensorFlow.

    The images stay encoded. A data set without a `label` feature is unlabelled.

    Raises:
      UserError: the data set, its split or its images are not there, or it is not
        stored as ArrayRecord.
    """

    def __init__(self, spec: str, data_dir: str = ""):
        name, self._split = parse_tfds_spec(spec)
        self.spec = spec
        self._folder = _find_prepared(spec, name, data_dir)
        self._data, features = self._open()
        self._length = len(self._data)
        self._labelled = "label" in features
        self.num_classes, self.class_names = _tfds_classes(spec, features)

    def _open(self) -> tuple[Any, dict[str, Any]]:
        """The records and the features of the data set."""
        import tensorflow_datasets as tfds  # slow, and only this source needs it

        try:
            builder = tfds.builder_from_directory(self._folder)
        # A damaged description fails in as many ways as there are fields in it.
        except Exception as error:
            raise UserError(
                f"{self.spec}: the data set in {self._folder} cannot be read "
                f"({type(error).__name__}: {error}): prepare it again with `tfds build "
                "--file_format=array_record`"
            ) from error
        self._splits = [
            f"{name} {int(info.num_bytes)} {list(info.shard_lengths)}"
            for name, info in builder.info.splits.items()
            if name in self._split
        ]
        features = dict(builder.info.features)
        if not isinstance(features.get("image"), tfds.features.Image):
            raise UserError(
                f"{self.spec}: the data set in {self._folder} has no feature 'image' "
                f"holding an image; its features are {', '.join(sorted(features))}"
            )
        decoders = {"image": tfds.decode.SkipDecoding()}
        try:
            data = builder.as_data_source(split=self._split, decoders=decoders)
        except NotImplementedError as error:
            raise UserError(
                f"{self.spec}: the data set in {self._folder} is not stored as "
                "ArrayRecord; prepare it again with `tfds build "
                "--file_format=array_record`"
            ) from error
        except (ValueError, KeyError) as error:
            sizes = ", ".join(
                f"{split} ({info.num_examples} images)"
                for split, info in builder.info.splits.items()
            )
            raise UserError(
                f"{self.spec}: no split {self._split!r}: {error}. The data set in "
                f"{self._folder} has {sizes or 'no splits'}"
            ) from error
        return data, features

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        if self._data is None:
            self._data, _ = self._open()
        record = self._data[index]
        label = int(record["label"]) if self._labelled else UNLABELLED
        return {"image": record["image"], "label": label}

    def describe(self, index: int) -> str:
        return f"{self.spec}[{index}]"

    def listing(self) -> Iterator[bytes]:
        """Bytes and lengths of the shards of each split that is read."""
        return (line.encode() for line in self._splits)

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel; a worker opens them at its first image.
        return {**self.__dict__, "_data": None}


def parse_tfds_spec(spec: str) -> tuple[str, str]:
    """Splits `tfds:NAME:SPLIT` into NAME and SPLIT; both may contain colons.

    NAME is `data_set`, `data_set/config`, each optionally followed by `:version`.

    Raises:
      UserError: the split is missing, or the brackets do not match.
    """
    match = _TFDS_SPEC.fullmatch(spec.removeprefix("tfds:"))
    if match is None:
        raise UserError(
            f"cannot read the data source {spec!r}: write tfds:NAME:SPLIT, for example "
            "tfds:cifar10:train or tfds:imagenet_v2/topimages:test[:1000]"
        )
    return match["name"], match["split"]


def _find_prepared(spec: str, name: str, data_dir: str) -> str:
    """The folder `data_dir/name/version`; the newest version unless one is named."""
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        root = reached(data_dir or default)
    except UserError as error:
        raise UserError(f"{spec}: data_dir: {error}") from error
    check_utf8(f"{spec}: data_dir", root)
    path, _, version = name.partition(":")
    folder = root / path
    if not folder.is_dir():
        raise UserError(
            f"{spec}: there is no data set {path!r} in {root} (found: "
            f"{_folder_names(root)}); set data_dir, or prepare it with `tfds build "
            f"{path} --file_format=array_record --data_dir={root}`"
        )
    try:
        children = list(folder.iterdir())
    except OSError as error:
        raise UserError(
            f"{spec}: {folder} cannot be read ({error.strerror or error}): make it "
            "readable"
        ) from error
    prepared = [path for path in children if (path / "dataset_info.json").exists()]
    versions = {child.name: str(child) for child in prepared}
    if not versions or (version and version not in versions):
        wanted = f"version {version!r}" if version else "prepared version"
        raise UserError(
            f"{spec}: there is no {wanted} in {folder} (found: "
            f"{_folder_names(folder)}); a configuration is named as in "
            "tfds:imagenet_v2/topimages:test"
        )
    return versions[version or max(versions, key=_version_key)]


def _version_key(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _folder_names(folder: Any) -> str:
    """The sub-folders of an epath folder, for a message."""
    if not folder.is_dir():
        return "no such folder"
    try:
        names = sorted(child.name for child in folder.iterdir() if child.is_dir())
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more if names else "nothing"


def _tfds_classes(
    spec: str, features: dict[str, Any]
) -> tuple[int | None, tuple[str, ...] | None]:
    """Number and names of the classes; (None, None) without a `label` feature."""
    import tensorflow_datasets as tfds

    label = features.get("label")
    if label is None:
        return None, None
    if not isinstance(label, tfds.features.ClassLabel):
        raise UserError(
            f"{spec}: the feature 'label' must be a ClassLabel, got "
            f"{type(label).__name__}"
        )
    return label.num_classes, tuple(map(of_class, label.names))
