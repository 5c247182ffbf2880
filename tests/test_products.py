"""Products of few rows, max pooling as maxima of shifted images, and GELU."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atebm_jax import UserError
from atebm_jax.models import layers
from atebm_jax.models.products import max_pool_shifted, multiply

# Image size, window, strides, padding.
POOLS = {
    "resnet": ((6, 8), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "odd": ((7, 5), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "overlapping": ((5, 6), (3, 2), (1, 1), ((1, 0), (0, 1))),
    "gaps": ((7, 7), (2, 2), (3, 3), ((0, 0), (0, 0))),
    "uneven": ((9, 8), (5, 3), (2, 3), ((2, 1), (0, 2))),
    "whole_image": ((4, 3), (4, 3), (4, 3), ((0, 0), (0, 0))),
}


@pytest.mark.parametrize("name", POOLS)
def test_values_and_gradients_are_xlas_also_where_elements_tie(name):
    size, *arguments = POOLS[name]
    rng = np.random.default_rng(0)
    # Few values, so that most windows have several largest elements.
    images = jnp.asarray(rng.integers(0, 3, (2, *size, 3)), jnp.float32)

    def loss(pool, x):
        made = pool(x, *arguments)
        return (made * jnp.cos(jnp.arange(made.size)).reshape(made.shape)).sum(), made

    ours, theirs = (
        jax.jit(jax.grad(lambda x, f=f: loss(f, x), has_aux=True))(images)
        for f in (max_pool_shifted, nn.max_pool)
    )
    np.testing.assert_array_equal(ours[1], theirs[1])
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-6)


def test_the_first_of_equal_elements_has_the_gradient():
    images = jnp.array([[1.0, 2.0, 2.0], [2.0, 0.0, 5.0]])[None, :, :, None]
    gradient = jax.grad(
        lambda x: max_pool_shifted(x, (2, 2), (1, 1), ((0, 0), (0, 0))).sum()
    )(images)
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[0, 1, 0], [0, 0, 1]])


def test_nan_and_infinity_are_seen_and_padding_never_wins():
    images = jnp.full((1, 2, 2, 1), -jnp.inf).at[0, 0, 0, 0].set(jnp.nan)
    window = ((3, 3), (2, 2), ((1, 1), (1, 1)))
    assert jnp.isnan(max_pool_shifted(images, *window)).all()
    lowest = jnp.full((1, 2, 2, 1), -jnp.inf)
    assert (max_pool_shifted(lowest, *window) == -jnp.inf).all()


def test_gradient_of_the_gradient_reaches_the_cotangent():
    images = jnp.asarray(np.random.default_rng(1).normal(size=(1, 4, 4, 2)), "float32")

    def penalty(pool, scale):
        inner = jax.grad(lambda x: (scale * pool(x)).sum())(images)
        return (inner**2).sum()

    window = ((3, 3), (2, 2), ((1, 1), (1, 1)))
    ours, theirs = (
        jax.grad(lambda s, f=f: penalty(lambda x: f(x, *window), s))(jnp.float32(3.0))
        for f in (max_pool_shifted, nn.max_pool)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_setting_picks_the_pooling_and_an_unknown_one_is_named():
    images = jnp.asarray(np.arange(32.0).reshape(1, 4, 4, 2), jnp.float32)
    made = [layers.max_pool(images, 3, 2, 1, form) for form in ("auto", "xla")]
    np.testing.assert_array_equal(*made)
    with pytest.raises(UserError, match="'fast'"):
        layers.max_pool(images, 3, 2, 1, "fast")


def test_gelu_is_jaxs_and_keeps_the_dtype():
    x = jnp.linspace(-8.0, 8.0, 101)
    np.testing.assert_allclose(
        layers.gelu(x), nn.gelu(x, approximate=False), rtol=1e-6, atol=1e-6
    )
    half = layers.gelu(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    # 1 Phi(1), from a table of the normal distribution.
    np.testing.assert_allclose(layers.gelu(jnp.float32(1.0)), 0.8413447, rtol=1e-6)


@pytest.mark.parametrize("lead", [(2, 3, 5), (32,), (33,), ()])
def test_products_of_few_rows_and_a_large_matrix_equal_the_plain_ones(lead):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        rows = jnp.asarray(rng.normal(size=(*lead, 600)))
        matrix = jnp.asarray(rng.normal(size=(600, 500)) / 600**0.5)

        def penalty(product, rows, matrix):
            """Of the gradient: its own derivatives are of second order."""
            gradient = jax.grad(lambda x: jnp.sin(product(x, matrix)).sum())(rows)
            return jnp.tanh(gradient).sum(), product(rows, matrix)

        ours, theirs = (
            jax.jit(
                jax.value_and_grad(partial(penalty, product), (0, 1), has_aux=True)
            )(rows, matrix)
            for product in (multiply, jnp.matmul)
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11),
            ours,
            theirs,
        )


def test_kernel_gradient_of_few_rows_and_a_large_matrix():
    rng = np.random.default_rng(1)
    rows = jnp.asarray(rng.normal(size=(4, 6, 600)), jnp.float32)
    matrix = jnp.asarray(rng.normal(size=(600, 500)) / 600**0.5, jnp.float32)
    ours, theirs = (
        jax.jit(jax.grad(lambda m, f=f: jnp.sin(f(rows, m)).sum()))(matrix)
        for f in (multiply, jnp.matmul)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def products_of_a_large_matrix(rows, multiplied):
    """Left and right shapes of the products in the gradient of a dense layer's rows."""
    matrix = jnp.ones((600, 500), rows.dtype)
    gradient = jax.grad(lambda x: jnp.sin(multiplied(x, matrix)).sum())
    return [
        tuple(value.aval.shape for value in equation.invars)
        for equation in jax.make_jaxpr(gradient)(rows).eqns
        if equation.primitive.name == "dot_general"
    ]


def test_few_rows_are_the_second_factor_where_a_gradient_is_asked_for():
    few = products_of_a_large_matrix(jnp.ones((2, 16, 600)), multiply)
    assert few[0] == ((500, 600), (32, 600))
    assert few[1] == ((600, 500), (32, 500))


@pytest.mark.parametrize(
    "rows", [jnp.ones((33, 600)), jnp.ones((32, 600), jnp.bfloat16)]
)
def test_many_rows_and_bfloat16_are_the_first_factor(rows):
    assert products_of_a_large_matrix(rows, multiply)[0][0] == rows.shape


def test_dense_layers_use_it_unless_set_to_xlas():
    rows = jnp.ones((32, 600))

    def layer(setting):
        def multiplied(x, matrix):
            dense = nn.Dense(
                500, use_bias=False, dot_general=layers.dense_product(setting)
            )
            return dense.apply({"params": {"kernel": matrix}}, x)

        return products_of_a_large_matrix(rows, multiplied)[0]

    assert layer("forward") == ((500, 600), (32, 600))
    assert layer("xla") == ((32, 600), (600, 500))
    with pytest.raises(ValueError, match="precision"):
        layers.dense_product("forward")(rows, jnp.ones((600, 500)), (), "highest")


def test_gradient_of_no_rows_is_zero():
    gradient = jax.grad(lambda m: multiply(jnp.zeros((0, 600)), m).sum())
    np.testing.assert_array_equal(gradient(jnp.ones((600, 500))), np.zeros((600, 500)))


@pytest.mark.parametrize("setting", ["xla", "forward"])
def test_dense_layers_equal_those_of_flax(setting):
    images = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 600)), "float32")
    plain = nn.Dense(500)
    variables = plain.init(jax.random.key(0), images)
    ours = nn.Dense(500, dot_general=layers.dense_product(setting))
    np.testing.assert_allclose(
        ours.apply(variables, images), plain.apply(variables, images), atol=1e-4
    )
