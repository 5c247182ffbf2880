"""PyTorch checkpoints in, weights out."""

from atebm_jax.convert.names import wide_resnet_from_torch

__all__ = ["wide_resnet_from_torch"]
