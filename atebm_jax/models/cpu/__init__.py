"""Convolution and max pooling in the forms that XLA's CPU compiler runs fast.

They compute what XLA's own operations do, but sum in another order. On a CPU, XLA's own
are many times slower (`benchmarks/README.md`). `layers` asks `in_use` and calls these;
networks do not know of them. Arrays are NHWC. Derivatives are reverse-mode only, of any
order.
"""

from contextlib import AbstractContextManager

import jax

from atebm_jax.errors import check_choice
from atebm_jax.models.cpu.convolution import conv
from atebm_jax.models.cpu.windows import max_pool

__all__ = ["conv", "forms", "in_use", "max_pool"]

# JAX's caches know this value: in another form, a function is traced again.
_chosen = jax.make_user_context(None)


def forms(name: str) -> AbstractContextManager[None]:
    """Traces programs in one form, whatever the default backend.

    Without it, JAX's default backend decides. Use `with cpu.forms("xla"):` to compile
    for a GPU or TPU on a CPU machine, to count XLA's operations, or to compare forms.

    Args:
      name: "cpu" for the forms of this package, "xla" for XLA's own.

    Raises:
      UserError: any other name.
    """
    check_choice("form of operations", name, ("cpu", "xla"))
    return _chosen(name)


def in_use() -> bool:
    """Whether a program that is traced now takes the forms of this package."""
    return (_chosen.value or jax.default_backend()) == "cpu"
