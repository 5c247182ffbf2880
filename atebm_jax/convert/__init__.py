"""PyTorch weights in and out."""

from atebm_jax.convert.names import from_torch, to_torch

__all__ = ["from_torch", "to_torch"]
