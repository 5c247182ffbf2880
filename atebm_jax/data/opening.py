"""Opens the data set that a string names."""

from collections.abc import Callable

import numpy as np

from atebm_jax.data.cifar import open_cifar
from atebm_jax.data.folder import FolderSource
from atebm_jax.data.prepared import PreparedSource
from atebm_jax.data.sources import ArraySource, Source
from atebm_jax.data.tfds import TfdsSource
from atebm_jax.errors import UserError, check_choice

_EXAMPLES = (
    *("digits:train", "tfds:cifar10:train", "tfds:cifar10:test[:1000]"),
    *("cifar:cifar-10-binary.tar.gz:train", "folder:/path/to/class/folders"),
    "prepared:/path/to/set",
)
_DIGITS_SPLIT_SEED = 0


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


# What stands before the first colon -> opens what stands behind it.
_OPENERS: dict[str, Callable[[str], Source]] = {
    "digits": _digits,
    "cifar": open_cifar,
    "folder": FolderSource,
    "prepared": PreparedSource,
}

#: What the spec of a data set begins with.
KINDS = (*(f"{kind}:" for kind in _OPENERS), "tfds:")
