"""Full-size ImageNet networks against the reference, with weights made by rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from atebm_jax import archs, convert, models

# Where the compiled network takes long on a CPU.
slow = pytest.mark.slow
CASES = [
    ("resnet50", 64),
    ("resnet50", 224),
    ("convnext_tiny_cvst", 64),
    ("convnext_tiny_cvst", 224),
    ("convnext_small_cvst", 64),
    pytest.param("convnext_small_cvst", 224, marks=slow),
    pytest.param("wide_resnet50_4", 64, marks=slow),
    pytest.param("wide_resnet50_4", 224, marks=slow),
    pytest.param("convnext_base_cvst", 64, marks=slow),
    pytest.param("convnext_base_cvst", 224, marks=slow),
    pytest.param("convnext_large_cvst", 64, marks=slow),
    pytest.param("convnext_large_cvst", 224, marks=slow),
]


def network_and_weights(stored, name, **overrides):
    block = archs.model_config(name, **overrides)
    weights = convert.from_torch(block.name, reference.rule_weights(stored))
    network = models.build(block)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    expected = jax.eval_shape(network.init, jax.random.key(0), images)
    assert jax.tree.map(np.shape, weights) == jax.tree.map(np.shape, expected)
    return network, weights


@pytest.mark.golden
@pytest.mark.parametrize(("name", "size"), CASES)
def test_logits_match_the_reference(golden, name, size):
    stored = golden(f"big_{name}")
    network, weights = network_and_weights(stored, name)
    count = sum(x.size for x in jax.tree.leaves(weights["params"]))
    assert count == int(stored["n_params"])
    images = golden("big_inputs")[f"images_{size}"]
    logits = jax.jit(network.apply)(weights, images)
    # The logits have a standard deviation of about 1.
    np.testing.assert_allclose(logits, stored[f"logits_{size}"], rtol=0, atol=2e-5)


@pytest.mark.golden
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", ["resnet50", "convnext_tiny_cvst"])
def test_double_precision_matches_the_reference_to_rounding(golden, name):
    stored = golden(f"big_{name}")
    network, weights = network_and_weights(stored, name)
    # The reference keeps mean and std rounded to float32.
    mean, std = (
        tuple(float(np.float32(x)) for x in values)
        for values in (network.mean, network.std)
    )
    network = network.clone(dtype=jnp.float64, mean=mean, std=std)
    # Flax's normalisation leaves float64 and float32 to promotion.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        images = golden("big_inputs")["images_64"].astype(np.float64)
        weights = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), weights)
        logits = jax.jit(network.apply)(weights, images)
    np.testing.assert_allclose(logits, stored["logits_64_f64"], rtol=0, atol=1e-11)
