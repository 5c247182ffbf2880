"""Convolutions in the form for CPUs against XLA's, and which form a program takes."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import conv_xla

from atebm_jax import UserError, losses
from atebm_jax.models import cpu, forms, layers

# Image size, window, strides, padding, groups.
GEOMETRIES = {
    "3x3": ((8, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), 1),
    "3x3_stride2": ((8, 8), (3, 3), (2, 2), ((1, 1), (1, 1)), 1),
    "3x3_stride2_odd": ((7, 9), (3, 3), (2, 2), ((1, 1), (1, 1)), 1),
    "1x1": ((5, 5), (1, 1), (1, 1), ((0, 0), (0, 0)), 1),
    "1x1_stride2": ((8, 7), (1, 1), (2, 2), ((0, 0), (0, 0)), 1),
    "2x3_side_by_side": ((7, 8), (2, 3), (2, 3), ((0, 0), (0, 0)), 1),
    "2x2_stride3": ((7, 8), (2, 2), (3, 3), ((0, 0), (0, 0)), 1),
    "3x3_on_2x2": ((2, 2), (3, 3), (1, 1), ((1, 1), (1, 1)), 1),
    "3x3_stride2_on_4x4": ((4, 4), (3, 3), (2, 2), ((1, 1), (1, 1)), 1),
    "2x2_asymmetric": ((6, 6), (2, 2), (1, 1), ((0, 1), (1, 0)), 1),
    "5x5_stride3": ((11, 10), (5, 5), (3, 3), ((2, 2), (2, 2)), 1),
    "5x5_wide_padding": ((3, 3), (5, 5), (2, 1), ((4, 4), (3, 4)), 1),
    "padding_beyond_window": ((4, 4), (1, 1), (1, 1), ((2, 1), (1, 2)), 1),
    "3x5_asymmetric": ((7, 6), (3, 5), (2, 3), ((0, 2), (3, 1)), 1),
    "3x3_two_groups": ((6, 7), (3, 3), (2, 2), ((1, 1), (1, 1)), 2),
    "window_is_image": ((5, 5), (5, 5), (1, 1), ((0, 0), (0, 0)), 1),
}


def normal(*shape, scale=1.0):
    """Numbers from NumPy: JAX would compile its generator anew for every shape."""
    values = np.random.default_rng(shape).normal(scale=scale, size=shape)
    return jnp.asarray(values.astype(np.float32))


@pytest.fixture(params=GEOMETRIES)
def geometry(request):
    """(images, kernel, arguments) of a convolution from 4 to 8 channels."""
    size, window, *arguments = GEOMETRIES[request.param]
    images = normal(2, *size, 4)
    # Sums of about one: of larger ones float32 itself is not exact to 1e-5.
    shape = (*window, 4 // arguments[-1], 8)
    kernel = normal(*shape, scale=np.prod(shape[:3]) ** -0.5)
    return images, kernel, arguments


def compiled(function):
    """Results of a function of a convolution, of ours and of XLA's, in one program."""
    return jax.jit(lambda *args: [function(c, *args) for c in (cpu.conv, conv_xla)])


def value_and_gradients(arguments):
    """Output and both gradients of a non-linear function of it."""

    def compute(conv, images, kernel):
        def loss(images, kernel):
            made = conv(images, kernel, *arguments)
            return jnp.sin(made).sum(), made

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(images, kernel)

    return compiled(compute)


def test_output_and_gradients_equal_those_of_xla(geometry):
    images, kernel, arguments = geometry
    # In double precision: the forms sum in different orders.
    with jax.enable_x64(True):
        images, kernel = (jnp.asarray(np.float64(x)) for x in (images, kernel))
        ours, theirs = value_and_gradients(arguments)(images, kernel)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
        ours,
        theirs,
    )
    assert ours[1][0].dtype == np.float64


@pytest.mark.parametrize(
    "geometry", ["3x3_stride2_odd", "3x5_asymmetric", "3x3_on_2x2"], indirect=True
)
def test_second_order_derivatives_equal_those_of_xla(geometry):
    """R1 differentiates the image gradient with respect to the kernel."""
    images, kernel, arguments = geometry

    def penalty(conv, images, kernel):
        def r1(images, kernel):
            def score(x):
                return jnp.tanh(conv(x, kernel, *arguments)).sum(axis=(1, 2, 3))

            return losses.r1(score, images)

        return jax.grad(r1, argnums=(0, 1))(images, kernel)

    for ours, theirs in zip(*compiled(penalty)(images, kernel), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        assert np.abs(theirs).max() > 1e-2


def test_gradient_is_worked_by_hand():
    # One window of 2x2 in steps of 2 over 3x3: the last row and column see nothing.
    images = jnp.zeros((1, 3, 3, 1))
    kernel = jnp.arange(1.0, 5.0).reshape(2, 2, 1, 1)
    gradient = jax.jit(
        jax.grad(lambda x: cpu.conv(x, kernel, (2, 2), ((0, 0), (0, 0))).sum())
    )(images)
    expected = [[1, 2, 0], [3, 4, 0], [0, 0, 0]]
    np.testing.assert_array_equal(gradient[0, :, :, 0], expected)


def test_bfloat16_gradients_keep_their_dtype_and_stay_close():
    images = normal(2, 6, 6, 4)
    kernel = normal(3, 3, 4, 8, scale=0.2)
    compute = value_and_gradients(GEOMETRIES["3x3_stride2"][2:])
    _, exact = compute(images, kernel)
    rounded, _ = compute(images.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    for ours, theirs in zip(rounded[1], exact[1], strict=True):
        assert ours.dtype == jnp.bfloat16
        scale = float(np.abs(theirs).max())
        np.testing.assert_allclose(
            ours.astype(jnp.float32), theirs, rtol=0, atol=0.03 * scale
        )


def test_gradients_are_the_same_inside_a_loop():
    images = normal(2, 7, 7, 4)
    kernel = normal(3, 3, 4, 8, scale=0.2)
    arguments = GEOMETRIES["3x3_stride2_odd"][2:]

    def climb(conv, count):
        def ascend(_, x):
            return x + 0.1 * jax.grad(
                lambda y: jnp.sin(conv(y, kernel, *arguments)).sum()
            )(x)

        return jax.lax.fori_loop(0, count, ascend, images)

    ours, theirs = compiled(climb)(jnp.int32(3))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_layer_equals_the_one_of_flax():
    images = normal(2, 7, 7, 4)
    ours = layers.Conv(6, 3, stride=2, padding=1, use_bias=True, groups=2)
    theirs = nn.Conv(
        6, (3, 3), strides=2, padding=1, use_bias=True, feature_group_count=2
    )
    weights = {"params": {"kernel": normal(3, 3, 2, 6), "bias": jnp.arange(6.0)}}
    made, expected = jax.jit(lambda v, x: (ours.apply(v, x), theirs.apply(v, x)))(
        weights, images
    )
    np.testing.assert_allclose(made, expected, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 4])
def test_context_chooses_the_form_also_of_a_function_traced_before(groups):
    layer = layers.Conv(4, 3, padding=1, groups=groups)
    weights = {"params": {"kernel": normal(3, 3, 4 // groups, 4)}}
    images = jnp.zeros((2, 8, 8, 4))

    @jax.jit
    def gradient(x):
        def score(x):
            return layers.max_pool(layer.apply(weights, x), 3, 2, 1).sum()

        return jax.grad(score)(x)

    def xlas():
        text = gradient.lower(images).as_text()
        return "reduce_window" in text or "select_and_scatter" in text

    assert not xlas()  # the tests run on a CPU
    with forms.only("xla"):
        assert xlas()
        with forms.only("cpu"):
            assert not xlas()
    assert not xlas()


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_form_follows_the_platform_that_a_program_is_lowered_for(platform):
    """On this CPU, by one and the same trace, also of a gradient's gradient."""
    images, kernel = normal(2, 8, 8, 4), normal(3, 3, 4, 4)

    def norm(x):
        def score(x):
            made = layers.conv(x, kernel, (1, 1), ((1, 1), (1, 1)))
            return layers.max_pool(made * made, 3, 2, 1).sum()

        return (jax.grad(score)(x) ** 2).sum()

    traced = jax.jit(jax.grad(norm)).trace(images)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    # XLA's own pooling, and the flipped kernel of the CPU's convolution.
    assert ("select_and_scatter" in text) == (platform != "cpu")
    assert ("optimization_barrier" in text) == (platform == "cpu")


@pytest.mark.parametrize(
    ("side", "groups", "barriers"),
    [
        (3, 4, [[], []]),
        (7, 1, [[], []]),
        # Images, in reverse once more for the kernel, and the smaller gradient.
        (7, 4, [["8x8x4"], ["8x8x4", "8x8x4", "2x2x4"]]),
    ],
)
def test_wide_grouped_convolution_of_a_tpu_reads_from_memory(side, groups, barriers):
    """Of what it makes, the image's gradient too, nothing is held back."""
    images, kernel = normal(2, 8, 8, 4), normal(side, side, 4 // groups, 4)

    def score(x, kernel):
        made = layers.conv(x, kernel, (1, 1), ((0, 0), (0, 0)), groups)
        return (made**2).sum()

    def held(function):
        traced = jax.jit(function).trace(images, kernel)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        return re.findall(r"optimization_barrier .*tensor<2x(\w+)xf32>", text)

    assert [held(score), held(jax.grad(score))] == barriers
    norm = lambda *of: sum((x**2).sum() for x in jax.grad(score, (0, 1))(*of))
    made = []
    for form in ("cpu", "xla"):
        with forms.only(form):
            made.append([jax.grad(f, (0, 1))(images, kernel) for f in (score, norm)])
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(
            ours, theirs, rtol=1e-3, atol=1e-3
        ),
        *made,
    )


def test_both_forms_have_the_same_derivatives_without_a_choice_and_with_vmap():
    images, kernel = normal(3, 2, 6, 6, 4), normal(3, 3, 4, 4)

    def score(x):
        made = layers.conv(x, kernel, (2, 2), ((1, 1), (1, 1)))
        return (layers.max_pool(made, 2, 1, 0) ** 2).sum()

    gradients = []
    for form in ("cpu", "xla"):
        with forms.only(form):
            gradients.append(jax.vmap(jax.grad(score))(images))
    free = jax.vmap(jax.grad(score))(images)
    np.testing.assert_allclose(free, gradients[0], atol=1e-5)
    np.testing.assert_allclose(free, gradients[1], atol=1e-5)


def test_unknown_form_is_refused():
    with pytest.raises(UserError, match="'fast'.*cpu, xla"):
        forms.only("fast")
