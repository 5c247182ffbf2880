"""Images in: sources, augmentations, and batches for training and evaluation."""

from atebm_jax.data import classes, content, relabel
from atebm_jax.data.augment import Augmentation, parse
from atebm_jax.data.decoding import decode
from atebm_jax.data.examples import read, read_or_next
from atebm_jax.data.pipeline import (
    Batches,
    Stream,
    eval_batches,
    materialise,
    train_batches,
)
from atebm_jax.data.sources import (
    KINDS,
    UNLABELLED,
    ArraySource,
    FolderSource,
    Source,
    TfdsSource,
    open_source,
)

__all__ = [
    "KINDS",
    "UNLABELLED",
    "ArraySource",
    "Augmentation",
    "Batches",
    "FolderSource",
    "Source",
    "Stream",
    "TfdsSource",
    "classes",
    "content",
    "decode",
    "eval_batches",
    "materialise",
    "open_source",
    "parse",
    "read",
    "read_or_next",
    "relabel",
    "train_batches",
]
