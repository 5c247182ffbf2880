"""Data sets that TensorFlow Datasets has prepared, read without TensorFlow."""

import os
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from atebm_jax.data.sources import UNLABELLED, Example, Source
from atebm_jax.errors import UserError
from atebm_jax.names import check_utf8, of_class
from atebm_jax.storage import reached

# The split is what follows the last colon outside of brackets.
_SPEC = re.compile(r"(?P<name>.+):(?P<split>(?:[^:\[\]]|\[[^\[\]]*\])+)")
_REMEDY = "prepare it again with `tfds build --file_format=array_record`"


class TfdsSource(Source):
    """A prepared ArrayRecord data set.

    The images stay encoded. A data set without a `label` feature is unlabelled.

    Raises:
      UserError: the data set, its split or its images are not there, or it is not
        stored as ArrayRecord.
    """

    def __init__(self, spec: str, data_dir: str = ""):
        self.spec = spec
        name, split = parse_tfds_spec(spec)
        folder = _find_prepared(spec, name, data_dir)
        builder = _opened(spec, folder)
        self._splits = [
            f"{name} {int(info.num_bytes)} {list(info.shard_lengths)}"
            for name, info in builder.info.splits.items()
            if name in split
        ]
        self._data = _read(spec, folder, builder, split)
        label = dict(builder.info.features).get("label")
        self._labelled = label is not None
        self.num_classes, self.class_names = None, None
        if label is not None:
            self.num_classes = label.num_classes
            self.class_names = tuple(map(of_class, label.names))

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Example:
        record = self._data[index]
        label = int(record["label"]) if self._labelled else UNLABELLED
        return {"image": record["image"], "label": label}

    def listing(self) -> Iterator[bytes]:
        """Bytes and lengths of the shards of each split that is read."""
        return (line.encode() for line in self._splits)


def parse_tfds_spec(spec: str) -> tuple[str, str]:
    """Splits `tfds:NAME:SPLIT` into NAME and SPLIT; both may contain colons.

    NAME is `data_set`, `data_set/config`, each optionally followed by `:version`.

    Raises:
      UserError: the split is missing, or the brackets do not match.
    """
    match = _SPEC.fullmatch(spec.removeprefix("tfds:"))
    if match is None:
        raise UserError(
            f"cannot read the data source {spec!r}: write tfds:NAME:SPLIT, for example "
            "tfds:cifar10:train or tfds:imagenet_v2/topimages:test[:1000]"
        )
    return match["name"], match["split"]


def _opened(spec: str, folder: str) -> Any:
    """The builder of a prepared data set of images, labelled or not."""
    import tensorflow_datasets as tfds  # slow, and only this source needs it

    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # a damaged description may raise anything
        raise UserError(
            f"{spec}: the data set in {folder} cannot be read "
            f"({type(error).__name__}: {error}): {_REMEDY}"
        ) from error
    features = dict(builder.info.features)
    if not isinstance(features.get("image"), tfds.features.Image):
        raise UserError(
            f"{spec}: the data set in {folder} has no feature 'image' holding an "
            f"image; its features are {', '.join(sorted(features))}"
        )
    if not isinstance(features.get("label"), tfds.features.ClassLabel | None):
        raise UserError(
            f"{spec}: the feature 'label' must be a ClassLabel, got "
            f"{type(features['label']).__name__}"
        )
    return builder


def _read(spec: str, folder: str, builder: Any, split: str) -> Any:
    """Random access to the records of a split, with encoded images."""
    import tensorflow_datasets as tfds

    decoders = {"image": tfds.decode.SkipDecoding()}
    try:
        return builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError as error:
        raise UserError(
            f"{spec}: the data set in {folder} is not stored as ArrayRecord; {_REMEDY}"
        ) from error
    except (ValueError, KeyError) as error:
        sizes = ", ".join(
            f"{name} ({info.num_examples} images)"
            for name, info in builder.info.splits.items()
        )
        raise UserError(
            f"{spec}: no split {split!r}: {error}. The data set in {folder} has "
            f"{sizes or 'no splits'}"
        ) from error


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
    prepared = [child for child in children if (child / "dataset_info.json").exists()]
    versions = {child.name: str(child) for child in prepared}
    if not versions or (version and version not in versions):
        wanted = f"version {version!r}" if version else "prepared version"
        raise UserError(
            f"{spec}: there is no {wanted} in {folder} (found: "
            f"{_folder_names(folder)}); a configuration is named as in "
            "tfds:imagenet_v2/topimages:test"
        )
    newest = max(versions, key=lambda name: [*map(int, re.findall(r"\d+", name))])
    return versions[version or newest]


def _folder_names(folder: epath.Path) -> str:
    """The sub-folders of a folder, for a message."""
    if not folder.is_dir():
        return "no such folder"
    try:
        names = sorted(child.name for child in folder.iterdir() if child.is_dir())
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more if names else "nothing"
