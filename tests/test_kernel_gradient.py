"""Kernel gradients as products of few images at a time; see `test_conv.py` too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from reference import Program, compiled, conv_xla

from atebm_jax import sharding
from atebm_jax.hlo import collectives
from atebm_jax.models.cpu.kernel_gradient import kernel_gradient

# Batch, image size, window, strides, padding: with eight devices one share or eight,
# and one image a turn, several, or several in turns that do not divide evenly.
CASES = {
    "one_share": (6, (9, 8), (3, 3), (1, 1), ((1, 1), (1, 1))),
    "a_share_a_device": (16, (9, 8), (3, 3), (1, 1), ((1, 1), (1, 1))),
    "several_images_a_turn": (48, (4, 4), (3, 3), (1, 1), ((1, 1), (1, 1))),
    "seven_in_turns_of_one": (7, (4, 4), (3, 3), (1, 1), ((1, 1), (1, 1))),
    "strides": (16, (8, 9), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "strides_in_one_direction": (8, (7, 8), (3, 2), (2, 1), ((1, 0), (0, 1))),
    "padding_beyond_the_window": (8, (3, 4), (2, 1), (1, 1), ((3, 2), (1, 2))),
    "no_padding": (8, (6, 5), (4, 3), (1, 1), ((0, 0), (0, 0))),
}


def random_pair(batch, size, window, strides, padding, channels=(3, 5)):
    """Images, a kernel, and the cotangent of their convolution, float64."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(batch, *size, channels[0])))
    kernel = jnp.asarray(rng.normal(size=(*window, *channels)))
    made = jax.eval_shape(lambda x, k: conv_xla(x, k, strides, padding), images, kernel)
    return images, kernel, jnp.asarray(rng.normal(size=made.shape))


@pytest.mark.parametrize("name", CASES)
def test_equals_xlas(name):
    window, strides, padding = CASES[name][2:]
    with jax.enable_x64(True):
        images, kernel, cotangent = random_pair(*CASES[name])

        @jax.jit
        def both(x, g, k):
            _, pullback = jax.vjp(lambda k: conv_xla(x, k, strides, padding), k)
            return kernel_gradient(x, g, window, strides, padding), pullback(g)[0]

        ours, theirs = both(images, cotangent, kernel)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
        assert ours.dtype == np.float64


def test_sums_of_bfloat16_are_float32():
    batch, _, *arguments = CASES["a_share_a_device"]
    images, cotangent = (
        jnp.ones((batch, 9, 8, channels), jnp.bfloat16) for channels in (1, 2)
    )
    images = images.at[0, 0, 0].set(2.0)
    made = kernel_gradient(images, cotangent, *arguments)
    # One pixel more than bfloat16 can count, on one device.
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made[0, 0, 0], np.float32([batch * 7 * 8 + 1] * 2))


def test_of_no_images_is_zero():
    arguments = CASES["one_share"][2:]
    made = kernel_gradient(jnp.zeros((0, 9, 8, 3)), jnp.zeros((0, 9, 8, 5)), *arguments)
    np.testing.assert_array_equal(made, np.zeros((3, 3, 3, 5)))


def test_devices_exchange_one_sum_after_the_loop():
    batch, size, *arguments = CASES["a_share_a_device"]
    images = jnp.zeros((batch, *size, 3))
    cotangent = jnp.zeros((batch, *size, 5))
    mesh = sharding.make_mesh()
    split = NamedSharding(mesh, PartitionSpec("data"))
    function = jax.jit(
        lambda x, g: kernel_gradient(x, g, *arguments),
        in_shardings=split,
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    program = Program(compiled(function.lower(images, cotangent)).as_text())
    assert program.loop_bodies()
    assert not any(collectives(body) for body in program.loop_bodies())
    assert collectives(program.everything()) == [
        ("all-reduce", 3 * 3 * 3 * 5, 4 * 3 * 3 * 3 * 5)
    ]
