"""Max pooling as maxima of shifted images."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atebm_jax.models import cpu

# Image size, window, strides, padding.
POOLS = {
    "resnet": ((6, 8), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "overlapping": ((5, 6), (3, 2), (1, 1), ((1, 0), (0, 1))),
    "gaps": ((7, 7), (2, 2), (3, 3), ((0, 0), (0, 0))),
    "uneven": ((9, 8), (5, 3), (2, 3), ((2, 1), (0, 2))),
}
RESNET = POOLS["resnet"][1:]


@pytest.mark.parametrize("name", POOLS)
def test_values_and_gradients_are_xlas_also_where_elements_tie(name):
    size, *arguments = POOLS[name]
    rng = np.random.default_rng(0)
    # Few values, so that most windows have several largest elements.
    images = jnp.asarray(rng.integers(0, 3, (2, *size, 3)), jnp.float32)

    def loss(pool, x):
        made = pool(x, *arguments)
        return (made * jnp.cos(jnp.arange(made.size)).reshape(made.shape)).sum(), made

    @jax.jit
    def both(x):
        return [
            jax.grad(lambda x, pool=pool: loss(pool, x), has_aux=True)(x)
            for pool in (cpu.max_pool, nn.max_pool)
        ]

    ours, theirs = both(images)
    np.testing.assert_array_equal(ours[1], theirs[1])
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-6)


def test_the_first_of_equal_elements_has_the_gradient():
    images = jnp.array([[1.0, 2.0, 2.0], [2.0, 0.0, 5.0]])[None, :, :, None]
    gradient = jax.jit(
        jax.grad(lambda x: cpu.max_pool(x, (2, 2), (1, 1), ((0, 0), (0, 0))).sum())
    )(images)
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[0, 1, 0], [0, 0, 1]])


def test_nan_and_infinity_are_seen_and_padding_never_wins():
    pool = jax.jit(lambda x: cpu.max_pool(x, *RESNET))
    lowest = jnp.full((1, 2, 2, 1), -jnp.inf)
    assert jnp.isnan(pool(lowest.at[0, 0, 0, 0].set(jnp.nan))).all()
    assert (pool(lowest) == -jnp.inf).all()


def test_gradient_of_the_gradient_reaches_the_cotangent():
    images = jnp.asarray(np.random.default_rng(1).normal(size=(1, 4, 4, 2)), "float32")

    def penalty(pool, scale):
        inner = jax.grad(lambda x: (scale * pool(x, *RESNET)).sum())(images)
        return (inner**2).sum()

    ours, theirs = jax.jit(
        lambda s: [
            jax.grad(lambda s, pool=pool: penalty(pool, s))(s)
            for pool in (cpu.max_pool, nn.max_pool)
        ]
    )(jnp.float32(3.0))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
