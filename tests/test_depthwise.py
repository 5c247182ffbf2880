"""Depthwise convolution as shifted images: XLA's values and derivatives."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import conv_xla

from atebm_jax.models import cpu, layers

SHAPES = [((2, 9, 6, 5), 7), ((1, 2, 3, 4), 7), ((3, 8, 8, 2), 3)]


def of_side(conv, images, kernel):
    """A depthwise convolution that keeps the images' size."""
    pad = (len(kernel) // 2,) * 2
    return conv(images, kernel, (1, 1), (pad, pad), images.shape[-1])


ours, xlas = partial(of_side, cpu.conv), partial(of_side, conv_xla)


def draw(shape, side, dtype=np.float32):
    rng = np.random.default_rng(sum(shape))
    images = rng.normal(size=shape).astype(dtype)
    return images, rng.normal(size=(side, side, 1, shape[-1])).astype(dtype)


def test_window_is_laid_over_each_channel_by_itself():
    images = jnp.zeros((1, 4, 4, 2)).at[0, 1, 1].set(jnp.array([1.0, 2.0]))
    kernel = jnp.zeros((3, 3, 1, 2)).at[0, 2, 0].set(jnp.array([3.0, 5.0]))
    # Element (0, 2) looks one row up and one column right.
    made = jax.jit(ours)(images, kernel)
    expected = np.zeros((1, 4, 4, 2), np.float32)
    expected[0, 2, 0] = (3.0, 10.0)
    np.testing.assert_array_equal(made, expected)


def test_it_is_no_convolution_of_xlas():
    images, kernel = draw((2, 9, 6, 5), 7)
    assert "conv_general" not in str(jax.make_jaxpr(ours)(images, kernel))


@pytest.mark.parametrize(("shape", "side"), SHAPES)
def test_values_and_gradients_are_xlas(shape, side):
    images, kernel = draw(shape, side)

    def score(function, x, k):
        return jnp.sin(function(x, k)).sum()

    @jax.jit
    def both(x, k):
        return [
            (f(x, k), jax.grad(score, argnums=(1, 2))(f, x, k)) for f in (ours, xlas)
        ]

    made, expected = both(images, kernel)
    chex.assert_trees_all_close(made, expected, atol=1e-4, rtol=1e-5)


def test_second_derivatives_are_xlas():
    """What R1 needs: the kernel's gradient of the norm of the image gradient."""
    images, kernel = draw((2, 5, 6, 3), 3)

    def penalty(function, k):
        def score(x):
            return jnp.sin(function(x, k)).sum()

        return (jax.grad(score)(jnp.asarray(images)) ** 2).sum()

    made, expected = jax.jit(
        lambda k: [jax.grad(partial(penalty, f))(k) for f in (ours, xlas)]
    )(kernel)
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_summed_in_float32():
    images, kernel = (jnp.asarray(x, jnp.bfloat16) for x in draw((2, 9, 9, 4), 7))
    made = jax.jit(ours)(images, kernel)
    exact = jax.jit(xlas)(images.astype(jnp.float32), kernel.astype(jnp.float32))
    assert made.dtype == jnp.bfloat16
    np.testing.assert_array_equal(made, exact.astype(jnp.bfloat16))
    gradient = jax.eval_shape(jax.grad(lambda k: ours(images, k).sum()), kernel)
    assert gradient.dtype == jnp.bfloat16


def test_layer_adds_its_bias_and_keeps_float32_parameters():
    images = jnp.zeros((2, 6, 6, 3))
    layer = layers.Conv(
        3, 7, padding=3, groups=3, use_bias=True, dtype=jnp.dtype("bfloat16")
    )
    shapes = jax.eval_shape(layer.init, jax.random.key(0), images)
    assert shapes["params"]["kernel"].shape == (7, 7, 1, 3)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    bias = jnp.array([0.0, 1.0, 2.0])
    weights = {"params": {"kernel": jnp.zeros((7, 7, 1, 3)), "bias": bias}}
    made = jax.jit(layer.apply)(weights, images)
    assert made.dtype == jnp.bfloat16
    np.testing.assert_array_equal(made[1, 2, 3].astype(jnp.float32), bias)
