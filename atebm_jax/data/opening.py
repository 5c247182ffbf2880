"""Opens the data set that a string names."""

from collections.abc import Callable

from atebm_jax.data.folder import FolderSource
from atebm_jax.data.in_memory import open_cifar, open_digits
from atebm_jax.data.prepared import PreparedSource
from atebm_jax.data.sources import Source
from atebm_jax.data.tfds import TfdsSource
from atebm_jax.errors import check_choice

_EXAMPLES = (
    *("digits:train", "tfds:cifar10:train", "tfds:cifar10:test[:1000]"),
    *("cifar:cifar-10-binary.tar.gz:train", "folder:/path/to/class/folders"),
    "prepared:/path/to/set",
)


def open_source(spec: str, data_dir: str = "") -> Source:
    """Opens the data set that `spec` names.

    Args:
      spec: `digits:train` or `digits:test` (scikit-learn's 8x8 digits),
        `cifar:PATH:SPLIT` (the authors' archive, binary version),
        `tfds:NAME:SPLIT` (a prepared ArrayRecord data set; NAME may carry a
        configuration and a version, SPLIT a slice), `folder:PATH` (images in one
        folder for each class, or unlabelled images without class folders), or
        `prepared:PATH` (what `atebm_jax.data.prepare` has written).
      data_dir: the folder of TFDS data sets; empty for $TFDS_DATA_DIR or
        ~/tensorflow_datasets. Other kinds ignore it.

    Raises:
      UserError: an unknown kind, or data that is absent or of another kind.
    """
    kind, _, rest = spec.partition(":")
    if kind == "tfds":
        return TfdsSource(spec, data_dir)
    if kind not in _OPENERS:
        check_choice("data source", spec, _EXAMPLES)
    return _OPENERS[kind](rest)


# What stands before the first colon -> opens what stands behind it.
_OPENERS: dict[str, Callable[[str], Source]] = {
    "digits": open_digits,
    "cifar": open_cifar,
    "folder": FolderSource,
    "prepared": PreparedSource,
}

#: What the spec of a data set begins with.
KINDS = (*(f"{kind}:" for kind in _OPENERS), "tfds:")
