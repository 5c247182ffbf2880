"""Convolutions with few outputs, several neighbouring windows at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from atebm_jax.models import layers, narrow

SAME = ((1, 1), (1, 1))


def noise(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), dtype)


def test_widened_kernel_is_worked_by_hand():
    wide = narrow.widened(jnp.asarray([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1), 2)
    # The first window sees pixels 0 to 2, its neighbour 1 to 3.
    np.testing.assert_array_equal(wide[0, :, 0], [[1, 0], [2, 1], [3, 2], [0, 3]])


@pytest.mark.parametrize(
    ("inputs", "outputs", "count"), [(3, 16, 4), (16, 16, 2), (16, 3, 8), (16, 32, 1)]
)
def test_joined_windows_give_the_convolution_itself(inputs, outputs, count):
    images, kernel = noise(2, 5, 8, inputs), noise(3, 3, inputs, outputs)
    assert narrow.windows_at_once(images, kernel, SAME, 1) == count
    made = layers.CONV_GRADIENTS["joined"](images, kernel, (1, 1), SAME)
    expected = layers.conv_xla(images, kernel, (1, 1), SAME)
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("images", "kernel", "padding", "groups"),
    [
        (noise(1, 5, 7, 4), noise(3, 3, 4, 4), SAME, 1),
        (noise(1, 5, 8, 4), noise(3, 3, 4, 4), ((0, 0), (0, 1)), 1),
        (noise(1, 5, 8, 4), noise(3, 3, 2, 4), SAME, 2),
        (noise(1, 5, 8, 4), noise(1, 1, 4, 4), ((0, 0), (0, 0)), 1),
        (
            noise(1, 5, 8, 4, dtype=jnp.bfloat16),
            noise(3, 3, 4, 4, dtype=jnp.bfloat16),
            SAME,
            1,
        ),
    ],
    ids=["odd_width", "odd_result", "groups", "one_pixel", "bfloat16"],
)
def test_windows_stay_single_where_joining_does_not_fit(
    images, kernel, padding, groups
):
    assert narrow.windows_at_once(images, kernel, padding, groups) == 1
