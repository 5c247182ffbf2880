"""One network in every wrapper that checkpoints come in."""

import dataclasses
import re

import flax
import flax.linen as nn
import numpy as np
import pytest

from atebm_jax import UserError, archs, models
from atebm_jax.convert import (
    files,
    importing,
    layouts,
    names,
    values,
)
from atebm_jax.models.family import AS_THEY_ARE, Family, TorchNames, outputs

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


def counters(prefix):
    """What modules that average keep beside the weights."""
    return {
        f"{prefix}decay": np.array(0.999, np.float32),
        f"{prefix}num_updates": np.array(3),
        "initted": np.array([True]),
        "step": np.array([7]),
    }


def renamed(arrays):
    """With the last layer under the name that JEM has for it."""
    return {n.replace("fc.", "class_output."): x for n, x in arrays.items()}


WRAPPERS = (
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)
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
    **{
        f"{wrapper} inside": lambda wrapper=wrapper: {
            name.replace("layer.0.", f"layer.{wrapper}.0.{wrapper}."): value
            for name, value in network().items()
        }
        for wrapper in WRAPPERS
    },
    "wrappers everywhere": lambda: {
        f"_orig_mod.module.{n.replace('.', '.module._orig_mod.', 1)}": value
        for n, value in network().items()
    },
    "counters of averages": lambda: network() | counters("net_ema."),
    "counters of other names": lambda: (
        network()
        | {
            name: np.array(3)
            for name in ("swa_n", "ema_updates", "update_count", "net.num_batches")
        }
    ),
    "two networks, one averaged": lambda: (
        {"initted": np.array(True), "step": np.array(7)}
        | under("online_model", network(1))
        | under("ema_model", network())
    ),
    "averages without dots": lambda: (
        under("net", network())
        | {f"net_ema.{n.replace('.', '')}": x for n, x in network(1).items()}
        | counters("net_ema.")
    ),
    "averages without statistics": lambda: {
        "model": network(),
        "ema": {n: x for n, x in network(1).items() if "running" not in n},
    },
    "a network below a network's name": lambda: (
        network() | under("teacher", network(1))
    ),
    "averages below a network's name": lambda: network(1) | under("ema", network()),
    "energy model": lambda: {
        f"{'' if name.startswith('class') else 'f.'}{name}": value
        for name, value in renamed(network()).items()
    },
    "energy model with both heads": lambda: (
        under("f", network() | {"fc.weight": np.ones((3, 16), np.float32)})
        | {n: x for n, x in renamed(network()).items() if n.startswith("class")}
        | under("energy_output", {"weight": np.ones((1, 16)), "bias": np.ones(1)})
    ),
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
        assert found.constants == {"mean": MEAN, "std": STD}
    else:
        assert not found.constants
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
    assert any(f"--entry={entry})" in step for step in found.steps)
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
    with pytest.raises(UserError, match=r"--entry=critic: .* begin with conv1, .*fc"):
        layouts.find(AsIs(tree["critic"]), "critic")


@pytest.mark.parametrize(
    "tree",
    [
        {"student": network(), "teacher": network(1)},
        {"state_dict": under("student", network()) | under("teacher", network(1))},
        under("module.student", network()) | under("module.teacher", network(1)),
        under("model.student.module", network())
        | under("model.teacher.module", network(1)),
        under("backbone_a", network()) | under("backbone_b", network(1)),
    ],
)
def test_teacher_and_student_are_told_apart_by_the_entries_to_give(tree):
    with pytest.raises(UserError, match="holds several networks") as caught:
        layouts.find(AsIs(tree))
    flags = re.findall(r"--entry=([\w.]*\w)", str(caught.value))
    assert len(flags) == 2
    for seed, flag in enumerate(flags):
        found = layouts.find(AsIs(tree), flag)
        assert set(found.arrays) == set(network())
        np.testing.assert_array_equal(found.arrays["fc.bias"], network(seed)["fc.bias"])


def test_names_that_would_become_one_stay_two():
    tree = network() | {"block1.module.layer.0.bn1.weight": np.ones((4, 4))}
    found = layouts.find(AsIs(tree))
    assert "block1.module.layer.0.bn1.weight" in found.arrays


ARRAYS = [np.ones((3, 3), np.float32), np.ones(3, np.float32)]


@pytest.mark.parametrize(
    ("beside", "named"),
    [
        ({"ema": {"decay": 0.9, "shadow_params": ARRAYS}}, "ema.shadow_params"),
        ({"shadow_params": ARRAYS, "decay": 0.9}, "shadow_params"),
        ({"ema": values.Inert("timm.utils.ModelEmaV2")}, "class timm.utils.ModelEmaV2"),
        ({"modelEMA": {"a": {"b": {"c": {"w": ARRAYS[0]}}}}}, "modelEMA.a.b.c"),
        ({"optimizer_states": [{"opt": {}, "ema": ARRAYS}]}, "optimizer_states.0.ema"),
    ],
)
def test_averages_that_cannot_be_used_are_named(beside, named):
    found = layouts.find(AsIs({"model": network(), "epoch": 3} | beside))
    np.testing.assert_array_equal(found.arrays["fc.bias"], network()["fc.bias"])
    lines = [step for step in found.steps if "averages that cannot be used" in step]
    assert len(lines) == 1 and named in lines[0]
    assert "took the weights under 'model'" in found.steps


def test_statistics_that_averages_lack_are_said_to_be_the_network_s():
    """Averages of parameters, and buffers that only the network itself has."""
    parts = {n: x for n, x in network().items() if "running" not in n}
    own = {n: x for n, x in network(1).items() if "running" in n}
    found = layouts.find(AsIs(under("ema", parts) | own))
    for name, value in (parts | own).items():
        np.testing.assert_array_equal(found.arrays[name], value)
    said = "under 'ema' have no batch statistics: took the network's own.*bn1.running_v"
    assert any(re.search(said, step) for step in found.steps)
    # Beside the whole network such averages are left out, which is said too.
    found = layouts.find(AsIs({"model": network(1), "ema": parts}))
    np.testing.assert_array_equal(found.arrays["fc.bias"], network(1)["fc.bias"])
    assert any("'ema': no running_var by name" in step for step in found.steps)
    whole = layouts.find(AsIs(under("ema", network()) | {"step": np.array(3)}))
    assert not any("statistics" in step for step in whole.steps)


def test_averages_alone_that_cannot_be_used_are_named():
    with pytest.raises(UserError, match="holds no weights.*ema.shadow_params"):
        layouts.find(AsIs({"ema": {"shadow_params": ARRAYS}}))


def test_averages_of_gradients_and_losses_are_no_weights():
    moments = {"exp_avg": [ARRAYS[0]], "grad_ema": [ARRAYS[0]]}
    tree = {"model": network(), "state": moments, "loss_avg": [ARRAYS[0]]}
    tree["accuracy_avg"] = [np.ones(()), np.ones(())]
    steps = layouts.find(AsIs(tree)).steps
    assert not any("averages" in step for step in steps)


def test_number_in_a_layer_is_no_counter():
    tree = network() | {"logit_scale": np.array(2, np.float32)}
    assert "logit_scale" in layouts.find(AsIs(tree)).arrays


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


def nested(depth):
    tree = {}
    for _ in range(depth):
        tree = {"": tree}
    return tree


@pytest.mark.parametrize(
    "tree", [{}, [], 3, {"epoch": 1}, {"optimizer": network()}, nested(10_000)]
)
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


def test_second_first_group_is_dropped_where_it_is_that():
    first = {n: x for n, x in network().items() if n.startswith("block1.")}
    tree = network() | {f"sub_{n}": x + 1 for n, x in first.items()}
    kept, said = names.without_unused("wide_resnet", tree)
    assert kept.keys() == network().keys()
    assert "dropped 2 arrays under 'sub_block1.'" in said[0]
    name = "sub_block1.layer.0.conv1.weight"
    for other in (
        tree | {"head2.weight": np.ones((3, 3))},
        tree | {name: np.ones((16, 16, 1, 1))},
        {n: x for n, x in tree.items() if n != name},
        tree | {name.replace(".0.", ".1."): tree[name]},
    ):
        kept, said = names.without_unused("wide_resnet", other)
        assert kept.keys() == other.keys() and not said
    assert names.without_unused("resnet", tree)[1] == []


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize(
    ("family", "name", "what"),
    [
        ("vit", "module.dist_token", "a distilled DeiT"),
        ("vit", "blocks.0.attn.relative_position_bias_table", "relative positions"),
        ("swin", "layers.0.blocks.0.attn.logit_scale", "a Swin V2"),
        ("swin", "absolute_pos_embed", "a Swin with absolute positions"),
        ("convnext", "stages.0.blocks.0.mlp.grn.weight", "a ConvNeXt V2"),
        ("resnet", "layer1.0.se.fc1.weight", "a ResNet with squeeze"),
        ("resnet", "layer1.0.conv2.weight", "a ResNeXt"),
        ("resnet", "conv1.0.weight", "a ResNet-D"),
        ("vit", "blocks.0.mlp.fc1_g.weight", "an EVA"),
        ("vit", "model.blocks.0.attn.q_bias", "an EVA"),
        ("vit", "patch_embed.backbone.stem.conv.weight", "a hybrid of a ResNet"),
    ],
)
def test_network_that_is_not_built_here_is_called_what_it_is(
    family, name, what, marked
):
    shapes = {"layer1.0.conv1.weight": (8, 8, 3, 3)} if "ResNeXt" in what else {}
    if marked:
        shapes |= {names.known(family).mark: (8, 8, 3, 3)}
    shapes |= {name: (8, 4, 3, 3)}
    assert names.recognise(shapes)[0] is None
    with pytest.raises(UserError, match=f"{what}.*not built here.*docs/convert.md"):
        importing._architecture("w.pt", "auto", shapes)


def test_swin_of_version_2_is_no_eva():
    # In the order of timm's file.
    parts = ("logit_scale", "q_bias", "v_bias", "cpb_mlp.0.weight")
    shapes = {f"layers.0.blocks.0.attn.{part}": (3,) for part in parts}
    for mark in ({}, {names.known("swin").mark: (288, 96)}):
        family, other = names.recognise(mark | dict(reversed(shapes.items())))
        assert family is None and other.startswith("a Swin V2")


def narrow(depth, widen_factor, **more):
    return archs.model_config("wrn16_4", depth=depth, widen_factor=widen_factor, **more)


@pytest.fixture
def narrow_family(monkeypatch):
    """WideResNets with small networks alone, as each is traced."""
    sizes = {"wrn10_1": (10, 1), "wrn10_2": (10, 2), "wrn16_1": (16, 1)}
    networks = {
        name: {"depth": depth, "widen_factor": width, "num_classes": 1000}
        for name, (depth, width) in sizes.items()
    }
    family = dataclasses.replace(models.FAMILIES["wide_resnet"], archs=networks)
    monkeypatch.setitem(models.FAMILIES, "wide_resnet", family)


@pytest.mark.usefixtures("narrow_family")
def test_unknown_file_is_told_what_it_is_most_like_and_what_differs():
    shapes = torch_shapes(narrow(10, 2, num_classes=7))
    others = {n.replace("block1.layer", "stage"): x for n, x in shapes.items()}
    others["conv1.weight"] = (16, 3, 5, 5)
    with pytest.raises(UserError, match="w.pt is no network that is built") as caught:
        importing._architecture("w.pt", "auto", others)
    said = str(caught.value)
    renamed = len(shapes.keys() - others.keys())
    assert (
        f"; it is most like wrn10_2: {len(shapes) - renamed - 1} of its {len(shapes)} "
        "arrays fit; other shapes: 1 (conv1.weight (16, 3, 5, 5) instead of "
        f"(16, 3, 3, 3)); missing: {renamed} (block1.layer.0.bn1.bias (16,), ...); "
        f"left over: {renamed} (stage.0."
    ) in said
    assert "--list prints" in said and "docs/convert.md" in said
    assert "\n" not in said and len(said) < 600


@pytest.mark.usefixtures("narrow_family")
def test_size_that_is_not_built_is_told_what_it_is_most_like(monkeypatch):
    family = models.FAMILIES["wide_resnet"]
    torch = dataclasses.replace(family.torch, fields=lambda shapes: {"depth": 10})
    family = dataclasses.replace(family, torch=torch)
    monkeypatch.setitem(models.FAMILIES, "wide_resnet", family)
    shapes = torch_shapes(narrow(16, 1)) | {"extra.weight": (3, 3)}
    message = "is a wide_resnet of a size that is not built here; it is most like wrn16"
    with pytest.raises(UserError, match=f"{message}.*1 .extra.weight .3, 3.") as caught:
        importing._architecture("w.pt", "auto", shapes)
    assert "missing" not in str(caught.value)


def test_of_two_families_that_have_the_names_the_plainer_is_nearest(monkeypatch):
    plain = models.FAMILIES["wide_resnet"]
    rules = (("block{g}.layer.{b}.se", "block{g}_{b}/se"), *plain.torch.rules)
    more = dataclasses.replace(
        plain, torch=dataclasses.replace(plain.torch, rules=rules)
    )
    monkeypatch.setattr(names, "FAMILIES", {"more": more, "plain": plain})
    shapes = {name: value.shape for name, value in network().items()}
    assert names.nearest(shapes) == "plain"
    shapes["block1.layer.0.se.weight"] = (2, 2, 1, 1)
    assert names.nearest(shapes) == "more"


def test_names_that_no_network_has_are_said_to_be_like_none():
    with pytest.raises(
        UserError, match=r"its names \(a, b, \.\.\.\) are like those of"
    ):
        importing._architecture("w.pt", "auto", {"b": (1,), "a": (2, 2)})


class Plain(nn.Module):
    """No norm, leaky ReLU, normalisation of its own."""

    width: int
    num_classes: int

    @nn.compact
    def __call__(self, images, *, train=False, features=False):
        x = nn.Conv(self.width, (3, 3), name="conv")(2 * images - 1)
        x = nn.leaky_relu(x, 0.2).mean(axis=(1, 2))
        return nn.Dense(self.num_classes, name="fc")(x)


PLAIN_FAMILY = Family(
    build=lambda config: Plain(config.plain_width, config.num_classes),
    sized_by=("plain_width",),
    activation="leaky_relu",
    torch=TorchNames(
        rules=(("layer1.0.se", "conv"), ("energy", "fc")),
        mark="layer1.0.se.bias",
        first=("layer1.0.se.weight",),
        fields=lambda shapes: {"plain_width": outputs(shapes, "layer1.0.se.bias")},
        side=lambda model: 8,
        usual=lambda model: AS_THEY_ARE,
    ),
)


def test_family_is_its_file_and_one_line(monkeypatch):
    """Its names go first where another family takes them for a look-alike's."""
    arrays = {
        "layer1.0.se.weight": np.ones((4, 3, 3, 3), np.float32),
        "layer1.0.se.bias": np.ones(4, np.float32),
        "energy.weight": np.ones((7, 4), np.float32),
        "energy.bias": np.ones(7, np.float32),
    }
    source = AsIs({"model": under("net", arrays) | under("net_ema", arrays)})
    monkeypatch.setattr(importing, "open_source", lambda path: source)
    monkeypatch.setattr(importing, "probe_logits", lambda *_: np.zeros(7))
    with pytest.raises(UserError, match="squeeze and excitation.*not built here"):
        importing.read("w.pt")
    monkeypatch.setitem(models.FAMILIES, "plain", PLAIN_FAMILY)
    with pytest.raises(UserError, match="--activation=relu: a plain has leaky_relu"):
        importing.read("w.pt", activation="relu")
    made = importing.read("w.pt")
    assert made.record["arch"] == "plain" and not made.config.model.mean
    assert made.config.data.image_shape == (8, 8, 3)
    assert (made.config.model.plain_width, made.config.model.num_classes) == (4, 7)
    assert archs.describe(made.config.model) == "plain-4"
    back = names.to_torch("plain", made.variables)
    assert {n: x.shape for n, x in back.items()} == {
        n: x.shape for n, x in arrays.items()
    }


def test_family_without_names_in_pytorch_is_said_to_have_none(monkeypatch):
    family = dataclasses.replace(PLAIN_FAMILY, torch=None)
    monkeypatch.setitem(models.FAMILIES, "plain", family)
    with pytest.raises(UserError, match="a plain has no names in PyTorch.*'torch'"):
        names.to_torch("plain", {"params": {"fc": {"bias": np.zeros(7)}}})
    assert names.recognise({"a": (1,)}) == (None, None)


def test_stages_of_a_swin_transformer_are_no_networks():
    names = ["patch_embed.proj.weight", "head.fc.weight"]
    names += [f"layers.{k}.blocks.0.attn.qkv.weight" for k in range(4)]
    names += ["layers.0.blocks.0.attn.relative_position_bias_table"]
    tree = dict.fromkeys(names, np.ones((3, 3), np.float32))
    found = layouts.find(AsIs(tree))
    assert set(found.arrays) == set(names) and not found.steps


def test_arrays_of_a_network_that_is_not_built_here_can_be_read():
    arrays = {"cls_attn_blocks.0.attn.q.weight": np.ones((3, 3), np.float16)}
    source = AsIs({"model": under("module", arrays)})
    read = layouts.read_arrays(source, layouts.find(source))
    assert {n: x.dtype.name for n, x in read.items()} == dict.fromkeys(
        arrays, "float32"
    )


def torch_shapes(model):
    """The shapes of a network's state dict, by PyTorch's names."""
    expected = models.variable_shapes(models.build(model), (224, 224, 3))
    flat = flax.traverse_util.flatten_dict(expected, sep="/")
    torchs = {}
    for path, x in flat.items():
        like = np.broadcast_to(np.False_, x.shape)
        name, array = names.one_to_torch(model.name, path, like)
        torchs[name] = array.shape
    return torchs


@pytest.mark.parametrize("family", sorted(models.BUILT_IN))
def test_networks_that_are_built_here_are_not_called_others(family):
    model = archs.model_config(
        next(n for n, a in archs.ARCHS.items() if a["name"] == family)
    )
    torchs = torch_shapes(model)
    assert names.recognise(torchs) == (family, None)
    # Some families leave a network that has their names too to its own family.
    left = family.startswith("mean_sparse") or family == "cosine_wide_resnet"
    alike = [names.look_alike(other, torchs) for other in models.BUILT_IN]
    assert left or not any(alike)
    assert names.looks_like_network(f"a.b.{name}" for name in torchs)


def test_architecture_is_told_from_names_and_shapes():
    shapes = {name: value.shape for name, value in network().items()}
    assert names.recognise(shapes) == ("wide_resnet", None)
    assert names.fields("wide_resnet", shapes) == {
        "name": "wide_resnet",
        "depth": 10,
        "widen_factor": 1,
        "num_classes": 10,
    }
    assert names.channels("wide_resnet", shapes) == 3
    assert names.recognise({"a": (1,)}) == (None, None)
