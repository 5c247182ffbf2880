"""The WideResNet against the reference, in every mode."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from ml_collections import ConfigDict

from atebm_jax import UserError, config, convert, energy, models
from atebm_jax.models import forms, layers, wide_resnet


@pytest.fixture(scope="module")
def weights(golden):
    return reference.variables(golden("wrn_state_dict"))


def readings(network, weights, images, labels):
    """Logits, features and the image gradients of both scores."""

    def score(x, y):
        logits = network.apply(weights, x)
        return energy.score(logits, y).sum(), logits

    @jax.jit
    def compute(x, y):
        by_label, logits = jax.grad(score, has_aux=True)(x, y)
        return {
            "logits_eval": logits,
            "features_eval": network.apply(weights, x, features=True),
            "grad_fy": by_label,
            "grad_logsumexp": jax.grad(score, has_aux=True)(x, None)[0],
        }

    return compute(images, labels)


@pytest.mark.parametrize("form", ["cpu", "xla"])
def test_evaluation_mode_matches_the_reference(golden, weights, form):
    wrn, network = golden("wrn"), reference.network()
    with forms.only(form):
        made = readings(network, weights, wrn["images"], wrn["labels"].astype(np.int32))
    for name, value in made.items():
        tolerance = 2e-6 if name.startswith("grad") else 1e-5
        np.testing.assert_allclose(value, wrn[name], rtol=0, atol=tolerance)
    assert made["logits_eval"].dtype == jnp.float32


def test_double_precision_matches_the_reference_to_rounding(golden, monkeypatch):
    wrn = golden("wrn")
    with jax.enable_x64(True):
        network = reference.double_network()
        made = readings(
            network,
            reference.variables(reference.double(golden("wrn_state_dict"))),
            wrn["images"].astype(np.float64),
            wrn["labels"].astype(np.int32),
        )
    for name, value in made.items():
        np.testing.assert_allclose(value, wrn[f"{name}_f64"], rtol=0, atol=1e-12)


def test_frozen_normalisation_is_evaluation_mode(golden, weights):
    wrn = golden("wrn")
    logits = models.logits_fn(reference.network(), weights)(wrn["images"])
    expected = wrn["logits_train_bn_frozen"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_training_mode_matches_the_reference_up_to_the_biased_variance(golden, weights):
    wrn = golden("wrn")
    logits, updated = jax.jit(
        lambda x: reference.network().apply(
            weights, x, train=True, mutable=["batch_stats"]
        )
    )(wrn["images"])
    np.testing.assert_allclose(logits, wrn["logits_train"], rtol=0, atol=1e-5)
    expected = reference.variables(wrn, "after_train/")["batch_stats"]
    ours, before = updated["batch_stats"], weights["batch_stats"]
    converted = reference.unbiased(ours, before, batch_size=8)
    reference.assert_close(converted, expected, atol=1e-6)
    # The stated difference is there, and small: n / (n - 1) on a tenth, n = 512.
    relative = jax.tree.map(lambda a, b: np.abs(a / b - 1).max(), ours, expected)
    assert 5e-5 < relative["bn1"]["var"] < 5e-4


def test_training_mode_needs_statistics_it_may_change(weights):
    with pytest.raises(Exception, match="batch_stats"):
        reference.network().apply(weights, jnp.zeros((2, 8, 8, 3)), train=True)


def test_bfloat16_keeps_parameters_and_logits_in_float32(golden, weights):
    images = golden("wrn")["images"]
    rounded = reference.network(dtype=jnp.bfloat16)
    # Flax's normalisation leaves bfloat16 images and float32 statistics to promotion.
    with jax.numpy_dtype_promotion("standard"):
        shapes = jax.eval_shape(rounded.init, jax.random.key(0), images)
        logits = jax.jit(models.logits_fn(rounded, weights))(images)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32
    exact = golden("wrn")["logits_eval"]
    # Eight bits of mantissa through nine convolutions, on logits of up to 3.
    away = np.abs(np.asarray(logits) - exact)
    assert 1e-4 < away.max() < 0.05
    np.testing.assert_array_equal(logits.argmax(axis=1), exact.argmax(axis=1))


def logits_and_gradients(network, many, images, labels):
    """Logits and image gradients of both scores for each of many weights."""

    def score(x, weights, y):
        logits = network.apply(weights, x)
        return energy.score(logits, y).sum(), logits

    @jax.jit
    def compute(weights):
        by_label, logits = jax.grad(score, has_aux=True)(images, weights, labels)
        marginal, _ = jax.grad(score, has_aux=True)(images, weights, None)
        return logits, by_label, marginal

    return [np.stack(parts) for parts in zip(*map(compute, many), strict=True)]


def test_relu_has_the_usual_derivatives_and_keeps_its_result_alone():
    x = jnp.array([-2.0, -0.0, 0.0, 0.25, 3.0])
    y, pull = jax.vjp(layers.relu, x)
    np.testing.assert_array_equal(y, [0, 0, 0, 0.25, 3])
    np.testing.assert_array_equal(pull(jnp.ones(5))[0], [0, 0, 0, 1, 1])
    curved = jax.grad(lambda x: (jax.grad(lambda x: layers.relu(x) ** 3)(x) ** 2) / 2)
    # (3 y^2)' (3 y^2) = 18 y^3
    assert curved(2.0) == 144 and curved(-2.0) == 0
    # The program compares the result, not the argument.
    text = jax.jit(jax.grad(lambda x: layers.relu(x).sum())).lower(x).as_text()
    (result,) = re.findall(r"(%\w+) = stablehlo.maximum", text)
    assert re.search(rf"compare +NE, {result},", text)


def test_bfloat16_with_norms_in_kernels_is_as_exact_as_layer_by_layer(
    golden, weights, monkeypatch
):
    """On average over kernels: in each of them chance rounds otherwise.

    It leaves a few per cent. The errors of float32 are hundreds of times smaller.
    """
    wrn, rng = golden("wrn"), np.random.default_rng(0)
    shaken = lambda x: np.float32(x * rng.uniform(0.8, 1.2, x.shape))
    many = [jax.tree.map(shaken, weights) for _ in range(32)]
    arguments = many, wrn["images"][:4], wrn["labels"][:4].astype(np.int32)
    exact = logits_and_gradients(reference.network(), *arguments)
    rounded = reference.network(dtype=jnp.bfloat16)
    folded = logits_and_gradients(rounded, *arguments)
    apart = lambda conv, norm, x: norm(conv(x))
    monkeypatch.setattr(wide_resnet, "normed", apart)
    by_layer = logits_and_gradients(rounded, *arguments)
    for ours, theirs, value in zip(folded, by_layer, exact, strict=True):
        size = np.square(value).mean()
        ours, theirs = (
            np.sqrt(np.square(x - value).mean() / size) for x in (ours, theirs)
        )
        assert 1e-4 < ours < 1.1 * theirs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_network_made_ready_is_the_network(golden, weights, dtype):
    """Also of weights in training: what is made ready is made of them, not kept."""
    network, images = reference.network(dtype=jnp.dtype(dtype)), golden("wrn")["images"]
    ready = jax.jit(lambda v, x: models.freeze(network, v, x.shape[1:])(x))
    plain = jax.jit(lambda v, x: models.logits_fn(network, v)(x))
    doubled = jax.tree.map(lambda x: 2 * x, weights)
    for variables in (weights, doubled):
        expected = plain(variables, images)
        np.testing.assert_allclose(
            ready(variables, images), expected, rtol=1e-6, atol=1e-6
        )


def test_full_size_network_matches_the_reference(golden):
    stored = golden("big_wrn34x10")
    arrays = reference.rule_weights(stored)
    network = reference.network(depth=34, widen_factor=10)
    made = convert.from_torch("wide_resnet", arrays)
    count = sum(x.size for x in jax.tree.leaves(made["params"]))
    assert count == int(stored["n_params"]) == 46_160_474
    logits = jax.jit(network.apply)(made, stored["images_32"])
    np.testing.assert_allclose(logits, stored["logits_32"], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("depth", "width", "blocks"), [(10, 1, 1), (16, 2, 2), (28, 10, 4), (34, 10, 5)]
)
def test_depth_counts_convolutions_and_width_multiplies_channels(depth, width, blocks):
    network = wide_resnet.network(depth, width, num_classes=7)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    params = shapes["params"]
    groups = [name for name in params if name.startswith("block")]
    assert len(groups) == 3 * blocks
    for group, channels in ((1, 16 * width), (2, 32 * width), (3, 64 * width)):
        last = params[f"block{group}_{blocks - 1}"]["conv2"]["kernel"]
        assert last.shape == (3, 3, channels, channels)
    assert params["fc"]["kernel"].shape == (64 * width, 7)
    shortcuts = [name for name in groups if "shortcut" in params[name]]
    assert shortcuts == [f"block{g}_0" for g in (1, 2, 3) if g > 1 or width > 1]


@pytest.mark.parametrize("shape", [(8, 8, 1), (12, 20, 3), (7, 9, 3)])
def test_any_image_size_and_channel_count_fits(shape):
    network = wide_resnet.network(10, 1, num_classes=5, activation="swish")
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    weights = jax.eval_shape(network.init, jax.random.key(0), images)
    logits = jax.eval_shape(network.apply, weights, images)
    assert (logits.shape, logits.dtype) == ((2, 5), jnp.float32)


def test_swish_is_another_function_of_the_same_weights(golden, weights):
    images = golden("wrn")["images"][:2]
    relu, swish = (
        jax.jit(models.logits_fn(reference.network(activation=name), weights))(images)
        for name in ("relu", "swish")
    )
    assert np.abs(relu - swish).max() > 0.1


def test_images_do_not_influence_each_other_in_evaluation_mode(golden, weights):
    images = golden("wrn")["images"]
    logits_fn = jax.jit(models.logits_fn(reference.network(), weights))
    together = logits_fn(images)
    np.testing.assert_allclose(logits_fn(images[::-1])[::-1], together, atol=1e-5)


def test_normalisation_of_other_channels_is_refused():
    network = reference.network()
    with pytest.raises(UserError, match="3 numbers for images of 1 channels"):
        network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


def model_config(**overrides):
    block = config.default().model
    block.update(ConfigDict({"depth": 10, "widen_factor": 1} | overrides))
    return block


def test_config_describes_the_network():
    block = model_config(
        mean=reference.MEAN, std=reference.STD, activation="swish", dtype="bfloat16"
    )
    expected = reference.network(activation="swish", dtype=jnp.dtype("bfloat16"))
    assert models.build(block) == expected


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "resnet18", "'resnet18'.*wide_resnet, .*resnet, .*convnext"),
        ("dtype", "float16", "'float16'.*float32, bfloat16"),
        ("depth", 12, "6n \\+ 4"),
        ("depth", 4, "6n \\+ 4"),
        ("widen_factor", 0, "widen_factor is 0"),
        ("num_classes", 0, "num_classes is 0"),
        ("activation", "tanh", "'tanh'.*relu, swish, gelu"),
    ],
)
def test_network_that_cannot_be_built_is_refused(field, value, message):
    with pytest.raises(UserError, match=message):
        models.build(model_config(**{field: value}))


def test_gelu_is_jaxs_and_keeps_the_dtype():
    x = jnp.linspace(-8.0, 8.0, 101)
    np.testing.assert_allclose(
        layers.gelu(x), nn.gelu(x, approximate=False), rtol=1e-6, atol=1e-6
    )
    assert layers.gelu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    # 1 Phi(1), from a table of the normal distribution.
    np.testing.assert_allclose(layers.gelu(jnp.float32(1.0)), 0.8413447, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "close"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_standardised_channels_and_their_derivatives_are_those_of_float64(dtype, close):
    """Also the derivative of a derivative."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 16)) + 0.5, dtype)
    direction = rng.normal(size=x.shape)

    def plain(x):
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)

    def figures(standardized, x):
        score = lambda x: (standardized(x) ** 3 * made).sum()
        made = jnp.asarray(direction, standardized(x).dtype)
        norm = lambda x: jnp.square(jax.grad(score)(x)).sum()
        return standardized(x), jax.grad(score)(x), jax.grad(norm)(x)

    ours = figures(lambda x: layers.standardized(x, 1e-6), x)
    with jax.enable_x64(), jax.numpy_dtype_promotion("standard"):
        exact = figures(plain, x.astype(jnp.float64))
    for found, wanted in zip(ours, exact, strict=True):
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted)
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(found / scale, wanted / scale, atol=close)
