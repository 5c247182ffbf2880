"""Adversarially trained energy-based models in JAX: classify, resist and generate."""

from importlib import metadata

from atebm_jax import constraints
from atebm_jax.api import Model, load
from atebm_jax.errors import UserError

__version__ = metadata.version("atebm_jax")

__all__ = ["Model", "UserError", "constraints", "load"]
