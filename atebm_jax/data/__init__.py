"""Images in: sources, augmentations, and batches for training and evaluation."""

from atebm_jax.data import classes, content, relabel
from atebm_jax.data.augment import parse
from atebm_jax.data.decoding import decode
from atebm_jax.data.examples import Images
from atebm_jax.data.folder import FolderSource
from atebm_jax.data.in_memory import ArraySource
from atebm_jax.data.opening import KINDS, open_source
from atebm_jax.data.pipeline import (
    Batches,
    Stream,
    eval_batches,
    materialise,
    train_batches,
)
from atebm_jax.data.sources import Source

__all__ = [
    "KINDS",
    "ArraySource",
    "Batches",
    "FolderSource",
    "Images",
    "Source",
    "Stream",
    "classes",
    "content",
    "decode",
    "eval_batches",
    "materialise",
    "open_source",
    "parse",
    "relabel",
    "train_batches",
]
