"""Inception-v3 against the reference's features, with weights made by rule."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from atebm_jax.convert import scorers
from atebm_jax.errors import UserError
from atebm_jax.evaluate import extractors
from atebm_jax.models import inception

slow = pytest.mark.slow
# Layers, and the reference's names of what they make; convolutions are pooled first.
BLOCKS = {
    "Conv2d_2b_3x3": "block64",
    "Conv2d_4a_3x3": "block192",
    "Mixed_6e": "block768",
}


@pytest.fixture(scope="module")
def weights(golden):
    return reference.rule_weights(golden("fid_inception"), gain=2.0)


def arranged(weights):
    network, name = inception.InceptionV3(), inception.torch_name
    return scorers.arranged(weights, network, inception.SIZE, name, UserError)


@pytest.fixture(scope="module")
def network(weights):
    variables = jax.tree.map(jnp.asarray, arranged(weights))

    # As an argument: the compiler would take long to fold constant weights.
    @jax.jit
    def run(variables, inputs):
        outputs, kept = inception.InceptionV3().apply(
            variables,
            inputs,
            capture_intermediates=lambda module, _: module.name in BLOCKS,
            mutable=["intermediates"],
        )
        made = {name: x["__call__"][0] for name, x in kept["intermediates"].items()}
        return outputs, made

    return partial(run, variables)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("size", "count"), [(32, 2), pytest.param(32, 8, marks=slow), (256, 2)]
)
def test_features_and_logits_match_the_reference(golden, network, size, count):
    stored = golden("fid_inception")
    images = jnp.asarray(golden("fid_inputs")[f"images_{size}"][:count])
    inputs = inception.resized(images)
    rows = stored[f"resized299_{size}_rows"]
    np.testing.assert_allclose(
        (inputs[0, rows] + 1.0) / 2.0,
        stored[f"resized299_{size}_image0_rows"],
        rtol=0,
        atol=1e-5,
    )
    outputs, kept = network(inputs)
    for ours, name in zip(outputs, ("pool3", "logits", "logits_unbiased"), strict=True):
        expected = stored[f"{name}_{size}"][:count]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4, err_msg=name)
    for name, block in BLOCKS.items():
        made = kept[name]
        if name.startswith("Conv"):
            made = nn.max_pool(made, (3, 3), (2, 2), "VALID")
        means = np.mean(made, axis=(1, 2))
        expected = stored[f"{block}_{size}_mean"][:count]
        np.testing.assert_allclose(means, expected, rtol=0, atol=1e-4, err_msg=block)


@pytest.mark.golden
def test_inception_score_has_its_own_resize(golden, network):
    stored = golden("fid_inception")
    images = np.round(golden("fid_inputs")["images_32"][:2] * 255).astype(np.uint8)
    inputs = extractors.score_inputs(images)
    levels = np.round(inputs[0, stored["is_path_32/rows"]] * 128 + 128)
    np.testing.assert_array_equal(levels, stored["is_path_32/pil299_u8_rows"])
    outputs, _ = network(jnp.asarray(inputs))
    np.testing.assert_allclose(
        outputs.unbiased_logits,
        stored["is_path_32/logits_unbiased"][:2],
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.golden
def test_weights_are_read_from_a_file(weights, tmp_path):
    numpy_files = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "inception.safetensors"
    numpy_files.save_file(weights, path)
    variables, sha256 = scorers.read_inception(path)
    assert len(sha256) == 64
    same = jax.tree.map(np.array_equal, variables, arranged(weights))
    assert all(jax.tree.leaves(same))
    del weights["Mixed_7c.branch_pool.conv.weight"]
    with pytest.raises(UserError, match="Mixed_7c.branch_pool.conv.weight is missing"):
        arranged(weights)


def test_missing_and_other_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match="no Inception weights at .*nowhere.pth"):
        scorers.read_inception(tmp_path / "nowhere.pth")
    numpy_files = pytest.importorskip("safetensors.numpy")
    other = tmp_path / "other.safetensors"
    numpy_files.save_file({"weight": np.zeros(3, np.float32)}, other)
    with pytest.raises(UserError, match="is not the Inception-v3"):
        scorers.read_inception(other)


def test_resize_of_a_constant_is_that_constant():
    images = jnp.full((1, 7, 400, 3), 0.25)
    np.testing.assert_allclose(inception.resized(images), -0.5, atol=1e-6)
