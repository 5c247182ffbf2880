"""One network in every wrapper that checkpoints come in."""

import numpy as np
import pytest

from atebm_jax import UserError
from atebm_jax.convert import detect, files, layouts

MEAN, STD = (0.25, 0.5, 0.75), (0.125, 0.25, 0.5)


class AsIs:
    """Stands for a file: its tree is of arrays already."""

    def __new__(cls, tree, metadata=None):
        return files.Source(__file__, "0" * 64, tree, np.asarray, metadata or {})


def network(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "conv1.weight": (16, 3, 3, 3),
        "block1.layer.0.bn1.weight": (16,),
        "block1.layer.0.conv1.weight": (16, 16, 3, 3),
        "bn1.running_var": (16,),
        "fc.weight": (10, 16),
        "fc.bias": (10,),
    }
    return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def under(prefix, arrays):
    return {f"{prefix}.{name}": value for name, value in arrays.items()}


def image(values):
    return np.float32(values).reshape(1, 3, 1, 1)


def robustness(own, copy):
    model = under("module.model", own) | under("module.attacker.model", copy)
    for name in ("module.normalizer", "module.attacker.normalize"):
        model[f"{name}.new_mean"] = np.float32(MEAN).reshape(3, 1, 1)
        model[f"{name}.new_std"] = np.float32(STD).reshape(3, 1, 1)
    return {"model": model, "optimizer": {"state": {}}, "epoch": 3}


NORMALIZED = {
    "robustness": lambda: robustness(network(), network()),
    "sequence by name": lambda: (
        {"normalize.mean": image(MEAN), "normalize.std": image(STD)}
        | under("model", network())
    ),
    "sequence by number": lambda: (
        {"0.mean": image(MEAN), "0.std": image(STD)} | under("1", network())
    ),
    "inside": lambda: network() | {"mean": np.float32(MEAN), "std": np.float32(STD)},
    "mu and sigma, wrapped": lambda: under(
        "module", {"mu": image(MEAN), "sigma": image(STD)} | network()
    ),
}
PLAIN = {
    "plain": network,
    "data parallel": lambda: under("module", network()),
    "model": lambda: under("model", network()),
    "base model": lambda: under("base_model", network()),
    "compiled": lambda: under("_orig_mod", network()),
    "three deep": lambda: under("module.base_model.net", network()),
    "unheard of": lambda: under("my_wrapper", network()),
    "averaged": lambda: {"n_averaged": np.int64(7)} | under("module.module", network()),
    **{
        entry: lambda entry=entry: {entry: network(), "epoch": 1, "best": 0.5}
        for entry in ("state_dict", "model", "model_state_dict", "net", "ema", "any")
    },
    "lightning": lambda: {
        "state_dict": under("model", network()),
        "callbacks": {"x": {}},
        "optimizer_states": [],
    },
    "state in a state": lambda: {"ema": {"module": network(), "decay": 0.99}},
    "with an optimiser": lambda: {
        "net": network(),
        "optimizer": {"state": {0: {"momentum_buffer": np.ones((3, 3))}}},
        "best_accuracy": np.float32(0.5),
    },
}


@pytest.mark.parametrize("kind", [*PLAIN, *NORMALIZED])
def test_wrapper_comes_off(kind):
    tree = (PLAIN | NORMALIZED)[kind]()
    found = layouts.find(AsIs(tree))
    expected = network()
    assert set(found.arrays) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found.arrays[name], value)
    if kind in NORMALIZED:
        assert (found.mean, found.std) == (MEAN, STD)
    else:
        assert found.mean is None and found.std is None
    assert bool(found.steps) == (kind != "plain")


@pytest.mark.parametrize("parallel", [False, True])
def test_averaged_model_of_torch_is_unwrapped(parallel, tmp_path):
    torch = pytest.importorskip("torch")
    inner = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    wrapped = torch.nn.DataParallel(inner) if parallel else inner
    averaged = torch.optim.swa_utils.AveragedModel(wrapped)
    torch.save({"model_ema": averaged.state_dict()}, tmp_path / "w.pt")
    found = layouts.find(files.open_source(tmp_path / "w.pt"))
    assert set(found.arrays) == set(inner.state_dict())
    assert any("n_averaged" in step for step in found.steps)


def test_copies_that_differ_are_refused_by_name_unless_one_is_chosen():
    tree = robustness(network(), network(1))
    with pytest.raises(UserError, match="attacker.model.conv1.weight .* differs"):
        layouts.find(AsIs(tree))
    for entry, seed in (("model.model", 0), ("model.attacker.model", 1)):
        found = layouts.find(AsIs(tree), entry)
        np.testing.assert_array_equal(found.arrays["fc.bias"], network(seed)["fc.bias"])


def test_copy_without_original_is_refused_by_name():
    copy = network() | {"extra.weight": np.ones((2, 2))}
    with pytest.raises(UserError, match="attacker.model.extra.weight.* is missing"):
        layouts.find(AsIs(robustness(network(), copy)))


@pytest.mark.parametrize(
    "tree",
    [
        {"state_dict": network(), "state_dict_ema": network(1)},
        {"model": network(), "model_ema": network(1), "epoch": 1},
        under("model", network()) | under("ema_model", network(1)),
    ],
)
def test_averaged_weights_go_first_and_others_can_be_chosen(tree):
    found = layouts.find(AsIs(tree))
    np.testing.assert_array_equal(found.arrays["fc.bias"], network(1)["fc.bias"])
    assert any("averaged" in step and "beside it" in step for step in found.steps)
    entry = "state_dict" if "state_dict" in tree else "model"
    found = layouts.find(AsIs(tree), entry)
    np.testing.assert_array_equal(found.arrays["fc.bias"], network()["fc.bias"])


def test_several_networks_are_listed():
    tree = {"generator": network(), "critic": network(1)}
    with pytest.raises(UserError, match="'generator', 'critic'.*--entry=generator"):
        layouts.find(AsIs(tree))
    found = layouts.find(AsIs(tree), "critic")
    np.testing.assert_array_equal(found.arrays["fc.bias"], network(1)["fc.bias"])
    with pytest.raises(UserError, match="--entry=other is not in the file"):
        layouts.find(AsIs(tree), "other")


def test_two_normalisations_that_differ_are_refused():
    tree = NORMALIZED["sequence by name"]()
    tree["model.mean"] = image(STD)
    with pytest.raises(UserError, match="twice and differently"):
        layouts.find(AsIs(tree))


@pytest.mark.parametrize("values", [(123.0, 116.0, 103.0), (-0.1, 0.2, 0.3)])
def test_normalisation_of_bytes_is_refused(values):
    tree = {"normalize.mean": image(values), "normalize.std": image(STD)}
    with pytest.raises(UserError, match="images in"):
        layouts.find(AsIs(tree | under("model", network())))


def test_lone_mean_is_refused():
    with pytest.raises(UserError, match="only the mean"):
        layouts.find(AsIs(network() | {"mean": image(MEAN)}))


@pytest.mark.parametrize("tree", [{}, [], 3, {"epoch": 1}, {"optimizer": network()}])
def test_file_without_weights_is_refused(tree):
    with pytest.raises(UserError, match="holds no weights"):
        layouts.find(AsIs(tree))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name(bad):
    tree = network()
    tree["fc.bias"][3] = bad
    with pytest.raises(UserError, match="fc.bias holds NaN or Inf"):
        layouts.read_arrays(AsIs(tree), layouts.find(AsIs(tree)))


def test_other_precisions_become_float32_with_a_note():
    tree = {n: v.astype(np.float16) for n, v in network().items()}
    tree["bn1.num_batches_tracked"] = np.int64(3)
    found = layouts.find(AsIs(tree))
    arrays = layouts.read_arrays(AsIs(tree), found)
    assert {x.dtype for x in arrays.values()} == {np.dtype(np.float32)}
    assert "bn1.num_batches_tracked" not in arrays
    assert "6 arrays were float16 and become float32" in found.steps


def test_architecture_is_told_from_names_and_shapes():
    shapes = {name: value.shape for name, value in network().items()}
    assert detect.family_of(shapes) == "wide_resnet"
    assert detect.fields("wide_resnet", shapes) == {
        "name": "wide_resnet",
        "depth": 10,
        "widen_factor": 1,
        "num_classes": 10,
    }
    assert detect.channels("wide_resnet", shapes) == 3
    assert detect.family_of({"a": 1}) is None
