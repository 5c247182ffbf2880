"""Convolution and max pooling in the forms that XLA's CPU compiler runs fast.

They compute what XLA's own operations do, but sum in another order. On a CPU, XLA's own
are many times slower (`benchmarks/README.md`). `layers` gives both to `forms.either`.
Networks do not know of them. Arrays are NHWC. Derivatives are reverse-mode only, of
any order.
"""

from atebm_jax.models.cpu.convolution import conv
from atebm_jax.models.cpu.windows import Padding, max_pool

__all__ = ["Padding", "conv", "max_pool"]
