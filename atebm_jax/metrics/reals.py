"""Real numbers of any dtype, without rounding.

Outside compiled functions, statistics are computed by NumPy in float64: JAX would round
float64 to float32, and would count in half precision.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Beyond it, float64 does not hold every whole number.
_LARGEST_EXACT = 2**53


def on_host(*arrays: Any) -> bool:
    """Whether none is traced by a compiled function or spread over processes."""
    return not any(
        isinstance(x, jax.core.Tracer)
        or (isinstance(x, jax.Array) and not x.is_fully_addressable)
        for x in arrays
    )


def real(values: Any) -> np.ndarray:
    """Bools, ints or floats: whole ones in 64 bits, others in float64 or more.

    Raises:
      ValueError: they are no real numbers.
    """
    array = np.asarray(values)
    if jnp.issubdtype(array.dtype, np.floating):
        # bfloat16 and the like are none of NumPy's own dtypes; float32 holds them.
        own = array.dtype if array.dtype.kind == "f" else np.float32
        return array.astype(np.promote_types(np.float64, own))
    if array.dtype == np.uint64:
        return array
    if array.dtype == np.bool_ or jnp.issubdtype(array.dtype, np.integer):
        return array.astype(np.int64)
    raise ValueError(f"an array is of dtype {array.dtype}: expected real numbers.")


def floats(values: Any) -> np.ndarray:
    """As `real`, float64."""
    return real(values).astype(np.float64)


def whole(values: Any, what: str) -> np.ndarray:
    """As `real`, int64.

    Raises:
      ValueError: some are no whole numbers, or too large for it.
    """
    array = real(values)
    with np.errstate(invalid="ignore"):
        ints = array.astype(np.int64)
    if (ints != array).any() or (array.dtype == np.uint64 and (ints < 0).any()):
        raise ValueError(f"some {what} are no whole numbers.")
    return ints


def counts(*numbers: Any) -> tuple[int, ...]:
    """Python's ints, as arithmetic of counts would overflow narrow dtypes."""
    return tuple(int(whole(number, "counts")) for number in numbers)


def comparable(one: Any, other: Any) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of numbers, flat and of one dtype, that compare as they are.

    Raises:
      ValueError: as of `real`.
    """
    pair = real(one).ravel(), real(other).ravel()
    common = np.result_type(*pair)
    if common.kind == "f" and not all(map(_exact_as_float, pair)):
        # Python compares whole numbers and floats of any size exactly.
        common = np.dtype(object)
    return pair[0].astype(common), pair[1].astype(common)


def count_nan(numbers: np.ndarray) -> int:
    """How many numbers are NaN, of an array as of `comparable`."""
    with np.errstate(over="ignore"):
        return int(np.isnan(numbers.astype(np.float64)).sum())


def _exact_as_float(array: np.ndarray) -> bool:
    if array.dtype.kind == "f" or not array.size:
        return True
    return -_LARGEST_EXACT <= array.min() and array.max() <= _LARGEST_EXACT


def traced(one: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two traced arrays in a common dtype: float32 for half precision and another.

    Raises:
      ValueError: int32 and uint32, as no compiled dtype holds both.
    """
    common = promoted(one.dtype, other.dtype)
    if common == jnp.int32 and jnp.uint32 in (one.dtype, other.dtype):
        raise ValueError(
            f"a compiled function cannot compare {one.dtype} with {other.dtype}: give "
            "both in one dtype."
        )
    if one.dtype != other.dtype and jnp.issubdtype(common, np.floating):
        common = promoted(common, np.float32)
    return one.astype(common), other.astype(common)


def promoted(one: Any, other: Any) -> Any:
    """JAX's common dtype, also where implicit promotion is forbidden."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(one, other)
