"""The form of an operation follows the platform that a program is lowered for.

When a program is traced nobody knows yet for which machine: a CPU may compile for a
TPU. So a trace holds one operation with both forms, of which lowering writes out one.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from atebm_jax.errors import check_choice

Form = Callable[..., jax.Array]

# JAX's caches know this value: in another form, a function is traced again.
_chosen = jax.make_user_context(None)


def only(name: str) -> AbstractContextManager[None]:
    """Traces programs in one form, whatever platform they are for.

    Use `with forms.only("xla"):` to count XLA's operations, or to compare forms.

    Args:
      name: "cpu" for the forms of `models.cpu`, "xla" for XLA's own.

    Raises:
      UserError: any other name.
    """
    check_choice("form of operations", name, ("cpu", "xla"))
    return _chosen(name)


def either(ours: Form, theirs: Form, *arrays: jax.Array) -> jax.Array:
    """`ours` of the arrays in programs for CPUs, `theirs` in all others.

    Reverse-mode derivatives only, of any order: those of the form that is used.

    Args:
      ours, theirs: arrays -> one array; the same function but for rounding.
      arrays: what they are called with.
    """
    if _chosen.value is not None:
        return (ours if _chosen.value == "cpu" else theirs)(*arrays)
    return _either(_single(ours), _single(theirs), *arrays)[0]


def _single(form: Form) -> Callable[..., tuple[jax.Array, ...]]:
    return lambda *arrays: (form(*arrays),)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _either(ours: Form, theirs: Form, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(_choice.bind(*arrays, ours=ours, theirs=theirs))


def _forward(ours: Form, theirs: Form, *arrays: jax.Array) -> tuple[Any, Any]:
    return _either(ours, theirs, *arrays), arrays


def _backward(
    ours: Form, theirs: Form, arrays: Any, cotangents: Any
) -> tuple[jax.Array, ...]:
    def pullback(form: Form) -> Form:
        count = len(arrays)
        return lambda *given: jax.vjp(form, *given[:count])[1](given[count:])

    return _either(pullback(ours), pullback(theirs), *arrays, *cotangents)


_either.defvjp(_forward, _backward)


_choice = Primitive("either_form")
_choice.multiple_results = True


@_choice.def_impl
def _run(*arrays: jax.Array, ours: Form, theirs: Form) -> Any:
    arrays = tuple(map(jnp.asarray, arrays))
    (platform,) = {device.platform for device in arrays[0].devices()}
    return (ours if platform == "cpu" else theirs)(*arrays)


@_choice.def_abstract_eval
def _shapes(*arrays: Any, ours: Form, theirs: Form) -> Any:
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    made = jax.eval_shape(theirs, *like)
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in made]


def _batched(arrays: Any, axes: Any, *, ours: Form, theirs: Form) -> Any:
    ours, theirs = (jax.vmap(form, in_axes=tuple(axes)) for form in (ours, theirs))
    made = _choice.bind(*arrays, ours=ours, theirs=theirs)
    return made, [0] * len(made)


batching.primitive_batchers[_choice] = _batched
mlir.register_lowering(
    _choice, mlir.lower_fun(lambda *arrays, ours, theirs: theirs(*arrays))
)
mlir.register_lowering(
    _choice,
    mlir.lower_fun(lambda *arrays, ours, theirs: ours(*arrays)),
    platform="cpu",
)
