"""Depthwise convolution as shifted images: XLA's values and derivatives."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atebm_jax import UserError
from atebm_jax.models.depthwise import (
    DepthwiseConv,
    depthwise_function,
    depthwise_shifted,
    depthwise_xla,
)

SHAPES = [((2, 9, 6, 5), 7), ((1, 2, 3, 4), 7), ((3, 8, 8, 2), 3), ((2, 4, 5, 1), 1)]


def draw(shape, side, dtype=np.float32):
    rng = np.random.default_rng(sum(shape))
    images = rng.normal(size=shape).astype(dtype)
    return images, rng.normal(size=(side, side, 1, shape[-1])).astype(dtype)


def test_window_is_laid_over_each_channel_by_itself():
    images = jnp.zeros((1, 4, 4, 2)).at[0, 1, 1].set(jnp.array([1.0, 2.0]))
    kernel = jnp.zeros((3, 3, 1, 2)).at[0, 2, 0].set(jnp.array([3.0, 5.0]))
    # Element (0, 2) looks one row up and one column right.
    made = depthwise_shifted(images, kernel)
    expected = np.zeros((1, 4, 4, 2), np.float32)
    expected[0, 2, 0] = (3.0, 10.0)
    np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize(("shape", "side"), SHAPES)
def test_values_and_gradients_are_xlas(shape, side):
    images, kernel = draw(shape, side)

    def score(function, x, k):
        return jnp.sin(function(x, k)).sum()

    made, expected = (
        jax.jit(lambda x, k, f=f: (f(x, k), jax.grad(score, argnums=(1, 2))(f, x, k)))(
            images, kernel
        )
        for f in (depthwise_shifted, depthwise_xla)
    )
    chex.assert_trees_all_close(made, expected, atol=1e-4, rtol=1e-5)


def test_second_derivatives_are_xlas():
    """What R1 needs: the kernel's gradient of the norm of the image gradient."""
    images, kernel = draw((2, 5, 6, 3), 3)

    def penalty(function, k):
        def score(x):
            return jnp.sin(function(x, k)).sum()

        return (jax.grad(score)(jnp.asarray(images)) ** 2).sum()

    made, expected = (
        jax.jit(jax.grad(lambda k, f=f: penalty(f, k)))(kernel)
        for f in (depthwise_shifted, depthwise_xla)
    )
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_summed_in_float32():
    images, kernel = (jnp.asarray(x, jnp.bfloat16) for x in draw((2, 9, 9, 4), 7))
    made = depthwise_shifted(images, kernel)
    exact = depthwise_xla(images.astype(jnp.float32), kernel.astype(jnp.float32))
    assert made.dtype == jnp.bfloat16
    np.testing.assert_array_equal(made, exact.astype(jnp.bfloat16))
    gradient = jax.grad(lambda k: depthwise_shifted(images, k).sum())(kernel)
    assert gradient.dtype == jnp.bfloat16


def test_layer_adds_its_bias_and_keeps_float32_parameters():
    images, _ = draw((2, 6, 6, 3), 7)
    layer = DepthwiseConv(7, jnp.bfloat16)
    weights = layer.init(jax.random.key(0), images)
    assert weights["params"]["kernel"].shape == (7, 7, 1, 3)
    assert {x.dtype for x in jax.tree.leaves(weights)} == {jnp.dtype("float32")}
    moved = {"params": weights["params"] | {"bias": jnp.array([0.0, 1.0, 2.0])}}
    made = layer.apply(moved, images) - layer.apply(weights, images)
    np.testing.assert_allclose(
        made.astype(np.float32).mean(axis=(0, 1, 2)), (0, 1, 2), atol=0.01
    )


def test_setting_picks_the_convolution():
    assert depthwise_function("auto") is depthwise_shifted
    assert depthwise_function("xla") is depthwise_xla
    with pytest.raises(UserError, match="'fast'.*auto, xla, forward"):
        depthwise_function("fast")
