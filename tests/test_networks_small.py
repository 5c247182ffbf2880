"""Networks for small images against PyTorch's, and the way from their files and back.

Random weights and statistics everywhere. In float32 a unit of a ReLU can land on the
other side of zero, which changes gradients: those are compared in double precision.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch_networks
import torch_small

from atebm_jax import UserError, archs, ascent, config, convert, fitting, models
from atebm_jax.convert import exporting, files, importing, layouts, names, normalization
from atebm_jax.models import layers, resnet
from atebm_jax.models.family import AS_THEY_ARE, CIFAR10, DEEPMIND

ONE = (1, 1, 1, 1)
TWO = (2, 1, 1, 1)
WIDE = {"depth": 10, "widen_factor": 1}
RA = {"blocks": "1-2-1", "widths": "8-12-16-24"}
HUANG = "blocks.{0}.layer.{2}"

# Architecture, other fields, and the same network in PyTorch.
KINDS = {
    "deepmind": (
        "dm_wrn28_10",
        WIDE,
        lambda: torch_small.deepmind((1, 1, 1), (16, 16, 32, 64), "swish"),
    ),
    "deepmind with relu": (
        "dm_wrn28_10",
        WIDE | {"activation": "relu"},
        lambda: torch_small.deepmind((1, 1, 1), (16, 16, 32, 64), "relu"),
    ),
    "mean sparse": (
        "mean_sparse_wrn70_16",
        WIDE,
        lambda: torch_small.deepmind(
            (1, 1, 1), (16, 16, 32, 64), "swish", threshold=0.5
        ),
    ),
    "mean sparse ra": (
        "mean_sparse_ra_wrn70_16",
        RA,
        lambda: torch_small.deepmind(
            (1, 2, 1), (8, 12, 16, 24), "swish", 0.25, threshold=0.5
        ),
    ),
    "ra": (
        "ra_wrn70_16",
        RA,
        lambda: torch_small.deepmind((1, 2, 1), (8, 12, 16, 24), "swish", 0.25),
    ),
    "huang 2021": (
        "wrn34_r",
        RA,
        lambda: torch_small.wide(
            (1, 2, 1), (8, 12, 16, 24), "relu", stem="stem_conv", place=HUANG
        ),
    ),
    "huang 2022": (
        "wrn_a4",
        RA,
        lambda: torch_small.wide(
            (1, 2, 1),
            (8, 12, 16, 24),
            "swish",
            "shortcut.0",
            "norm1",
            stem="stem_conv",
            place=HUANG,
        ),
    ),
    "ra for imagenet": (
        "ra_wrn101_2",
        {"blocks": "1-2-1-1", "widths": "8-16-24-32-48", "num_classes": 10},
        lambda: torch_small.ra_imagenet((1, 2, 1, 1), (8, 16, 24, 32, 48)),
    ),
    "preact": ("preact_resnet18", {}, lambda: torch_small.preact(ONE, "relu")),
    "preact without norm": (
        "preact_resnet18_nonorm_raw",
        {},
        lambda: torch_small.preact(ONE, "relu", final_norm=False, raw=True),
    ),
    "preact as pytorch-cifar has it": (
        "preact_resnet18_nonorm",
        {"activation": "swish"},
        lambda: torch_small.preact(ONE, "swish", final_norm=False),
    ),
    "preact with raw shortcuts": (
        "preact_resnet18_raw",
        {"activation": "gelu"},
        lambda: torch_small.preact(ONE, "gelu", raw=True),
    ),
    "deepmind's preact": (
        "dm_preact_resnet18",
        {},
        lambda: torch_small.deepmind_preact(ONE, "swish"),
    ),
    "small": ("small_resnet18", {}, lambda: torch_small.resnet(ONE, "relu")),
    "small with gelu": (
        "small_resnet18",
        {"activation": "gelu"},
        lambda: torch_small.resnet(ONE, "gelu"),
    ),
    "small with bottlenecks": (
        "small_resnet50",
        {"activation": "swish"},
        lambda: torch_small.resnet(TWO, "swish", bottleneck=True),
    ),
    "cosines": (
        "cosine_wrn34_20",
        WIDE,
        lambda: torch_small.wide((1, 1, 1), (16, 16, 32, 64), "relu", cosine=True),
    ),
    "pssilu": (
        "pssilu_wrn28_10",
        WIDE,
        lambda: torch_small.wide((1, 1, 1), (16, 16, 32, 64), "pssilu"),
    ),
    "jem": ("jem_wrn28_10", WIDE, lambda: torch_small.jem(1, 1)),
    "imagenet with gelu": (
        "resnet18",
        {"activation": "gelu", "num_classes": 10},
        lambda: torch_small.resnet(ONE, "gelu", small=False),
    ),
    "imagenet with swish": (
        "resnet50",
        {"activation": "swish", "num_classes": 10},
        lambda: torch_small.resnet(TWO, "swish", bottleneck=True, small=False),
    ),
}
SMOOTH = [
    name
    for name, (arch, fields, _) in KINDS.items()
    if (archs.arch(arch) | fields).get("activation") in ("swish", "gelu")
    # Its stem has ReLU; and where a value becomes the mean is a jump.
    and arch != "ra_wrn101_2"
    and not arch.startswith("mean_sparse")
]


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    reference.shallow(monkeypatch)
    monkeypatch.setitem(resnet.STAGES, 50, TWO)


def described(kind, **others):
    """`config.model` of a kind, without normalisation."""
    arch, fields, _ = KINDS[kind]
    return archs.model_config(arch, **AS_THEY_ARE, **fields, **others)


def pictures(seed=0, side=16):
    return np.random.default_rng(seed).random((2, side, side, 3), np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_pytorchs_in_double_precision(kind):
    theirs = KINDS[kind][2]().double()
    images = pictures().astype(np.float64)
    expected = torch_networks.logits_and_gradient(theirs, images, 3)
    assert expected[0].std() > 0.01
    model = described(kind)
    with jax.enable_x64(True):
        weights = convert.from_torch(model.name, torch_networks.state_dict(theirs))
        network = models.build(model).clone(dtype=jnp.float64)
        made = reference.logits_and_gradient(network, weights, images, 3)
    for actual, value in zip(made, expected, strict=True):
        reference.assert_relative(actual, value, 1e-11)


@pytest.mark.parametrize("kind", SMOOTH)
def test_logits_and_gradients_of_smooth_networks_are_pytorchs(kind):
    theirs = KINDS[kind][2]()
    expected = torch_networks.logits_and_gradient(theirs, pictures(), 3)
    model = described(kind)
    weights = convert.from_torch(model.name, torch_networks.state_dict(theirs))
    made = reference.logits_and_gradient(models.build(model), weights, pictures(), 3)
    for actual, value in zip(made, expected, strict=True):
        reference.assert_relative(actual, value, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_file_is_recognised_and_loads_back_strictly(kind, tmp_path):
    torch, _ = torch_networks.torch_and_timm()
    arch, _, build = KINDS[kind]
    theirs, model = build(), described(kind)
    torch.save({"state_dict": theirs.state_dict(), "epoch": 3}, tmp_path / "w.pt")
    only = models.FAMILIES[model.name].activation
    made = importing.read(
        tmp_path / "w.pt",
        # What shortcuts see stands in no file.
        arch=arch if "preact" in arch and "dm" not in arch else "auto",
        asked=normalization.parse("none", None, None),
        activation=None if only else model.activation,
    )
    sizes = ("name", "num_classes", *models.FAMILIES[model.name].sized_by)
    assert [made.config.model[field] for field in sizes] == [model[f] for f in sizes]
    image = importing.probe_image(made.config.data.image_shape)
    with torch.no_grad():
        expected = theirs(torch.tensor(image).permute(2, 0, 1)[None])[0].numpy()
    reference.assert_relative(made.record["probe"]["logits"], expected, 1e-5)
    back = convert.to_torch(model.name, made.variables)
    back |= names.known(model.name).beside(back)
    state = {name: torch.tensor(value) for name, value in back.items()}
    theirs.load_state_dict(state, strict=True)
    reference.assert_same_bits(convert.from_torch(model.name, back), made.variables)


def test_forty_steps_in_a_smooth_network_are_pytorchs():
    """No unit flips, so that rounding alone separates the two after T = 40."""
    torch, _ = torch_networks.torch_and_timm()
    theirs, step_size, labels = KINDS["deepmind"][2](), 0.1, [3, 7]
    model = described("deepmind")
    weights = convert.from_torch(model.name, torch_networks.state_dict(theirs))
    network = models.build(model)

    @jax.jit
    def climbed(images, weights, steps):
        score = lambda x: network.apply(weights, x)[jnp.arange(2), jnp.array(labels)]
        return ascent.climb(score, images, step_size=step_size, num_steps=steps)

    x = torch.tensor(pictures().transpose(0, 3, 1, 2))
    for _ in range(40):
        x = x.detach().requires_grad_()
        theirs(x)[[0, 1], labels].sum().backward()
        length = x.grad.flatten(1).norm(dim=1)[:, None, None, None]
        x = (x + step_size * x.grad / (length + 1e-10)).clamp(0, 1)
    expected = x.detach().numpy().transpose(0, 2, 3, 1)
    assert np.abs(expected - pictures()).max() > 0.2
    made = climbed(pictures(), weights, 40)
    np.testing.assert_allclose(made, expected, rtol=0, atol=2e-5)


def shapes_in_pytorch(model):
    """Names and shapes of a network's arrays as its authors save them."""
    side = names.known(model.name).side(model)
    expected = models.variable_shapes(models.build(model), (side, side, 3))
    flat = jax.tree_util.tree_leaves_with_path(expected)
    made = {}
    for path, x in flat:
        place = "/".join(part.key for part in path)
        like = np.broadcast_to(np.False_, x.shape)
        name, array = names.one_to_torch(model.name, place, like)
        made[name] = array.shape
    return made


def read(tree, monkeypatch, metadata=None, **flags):
    """Imports arrays in memory, without a pass through the network."""
    source = files.Source(__file__, "0" * 64, tree, np.asarray, metadata or {})
    monkeypatch.setattr(importing, "open_source", lambda path: source)
    # The arrays are in no file that their size could be compared with.
    monkeypatch.setattr(layouts, "_MOST_COPIES", 10**9)
    monkeypatch.setattr(
        importing, "probe_logits", lambda model, *_: np.zeros(model.num_classes)
    )
    return importing.read("w.pt", **flags)


def ones(kind, **others):
    shapes = shapes_in_pytorch(described(kind, **others))
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", ["deepmind", "ra", "deepmind's preact"])
def test_deepminds_normalisation_and_swish_are_assumed_and_said(kind, monkeypatch):
    made = read(ones(kind), monkeypatch)
    model = made.config.model
    assert (model.mean, model.std) == tuple(DEEPMIND[10].values())
    assert model.activation == "swish"
    first, second = made.record["assumed"]
    assert first.startswith("input normalisation: mean [0.4914, 0.4822, 0.4465]")
    assert second.startswith("activation: swish (no file says it)")
    # The file has precedence, and the flags.
    image = {"mean": np.float32([0.5, 0.25, 0.5]).reshape(3, 1, 1)}
    image["std"] = np.float32([0.25, 0.5, 0.25]).reshape(3, 1, 1)
    made = read(ones(kind) | image, monkeypatch, activation="relu")
    assert made.config.model.mean == (0.5, 0.25, 0.5)
    assert made.config.model.activation == "relu" and not made.record["assumed"]


def test_what_only_gathers_statistics_of_sparse_activations_is_dropped(monkeypatch):
    tree = ones("mean sparse")
    kept = read(tree, monkeypatch)
    for place in ("layer.0.block.0.meansparse_0", "meansparse_end"):
        tree[f"{place}.flag_update_statistics"] = np.array(0)
        tree[f"{place}.batch_num"] = np.array(0, np.float32)
    made = read(tree, monkeypatch)
    assert made.record["unwrapped"] == [
        "dropped 4 arrays that only count while MeanSparse gathers its statistics"
    ]
    reference.assert_same_bits(made.variables, kept.variables)


def test_sparse_activations_change_only_values_close_to_their_mean():
    """Mean 1 and standard deviation 2, half of which is close."""
    stats = {"mean": [1.0, 0.0], "var": [4.0, 4.0], "threshold": 0.5}
    stats = {name: jnp.float32(value) for name, value in stats.items()}
    x = jnp.float32([[1.9, 1.0], [2.0, -0.9], [0.1, -1.1]])
    made = layers.MeanSparse().apply({"batch_stats": stats}, x)
    np.testing.assert_array_equal(made, np.float32([[1, 1], [2, 0], [1, -1.1]]))


def test_copies_of_the_one_activation_must_be_equal(monkeypatch):
    """PyTorch writes them for every block."""
    tree = ones("pssilu")
    copy = {"block2.layer.0.activation.beta": np.ones(1, np.float32)}
    made = read(tree | copy, monkeypatch)
    assert made.variables["params"]["activation"]["beta"] == 1
    copy = {name: 2 * value for name, value in copy.items()}
    with pytest.raises(UserError, match="left over: 1 .block2.layer.0.activation.beta"):
        read(tree | copy, monkeypatch)


def test_each_image_may_be_normalised_by_its_own_mean_and_deviation(monkeypatch):
    """Two values of 0 and two of 1: mean 1/2, and a sample's deviation of 1/sqrt(3)."""
    image = jnp.float32([0, 1, 1, 0]).reshape(1, 2, 2, 1)
    made = layers.standardize(image).ravel()
    np.testing.assert_allclose(made, np.float32([-1, 1, 1, -1]) * 0.75**0.5, rtol=1e-6)
    # One colour: by 1 / sqrt(n), and no gradient is NaN.
    flat = jnp.full((1, 2, 2, 3), 0.5)
    assert not layers.standardize(flat).any()
    slope = jax.grad(lambda x: layers.standardize(x)[0, 0, 0, 0])(flat)
    np.testing.assert_allclose(slope[0, 0, 0, 0], 12**0.5 * 11 / 12, rtol=1e-6)
    images = pictures()
    network = models.build(described("deepmind", standardize=True))
    torch, _ = torch_networks.torch_and_timm()
    x = torch.tensor(images)
    x = (x - x.mean((1, 2, 3), True)) / x.std((1, 2, 3), keepdim=True)
    np.testing.assert_allclose(network.normalised(jnp.asarray(images)), x, atol=1e-6)


def test_normalisation_by_image_is_asked_for_and_stays(monkeypatch, tmp_path):
    pytest.importorskip("safetensors")
    flags = {"asked": normalization.parse("per_image", None, None)}
    made = read(ones("preact"), monkeypatch, **flags)
    assert made.config.model.standardize and made.config.model.mean == ()
    assert made.record["normalization"]["inside_the_network"]
    importing.write(made, tmp_path / "imported")
    said = exporting.export(str(tmp_path / "imported"), str(tmp_path / "w.st"))
    assert "each image's own mean and standard deviation" in said[-1]
    tree = {"mean": np.ones((3, 1, 1)) / 2, "std": np.ones((3, 1, 1)) / 2}
    with pytest.raises(UserError, match="means each image's own .* file itself has"):
        read(ones("preact") | tree, monkeypatch, **flags)
    monkeypatch.setattr(importing, "open_source", files.open_source)
    assert importing.read(tmp_path / "w.st").config.model.standardize
    with pytest.raises(UserError, match="none means none, .*each image's own mean"):
        none = normalization.parse("none", None, None)
        importing.read(tmp_path / "w.st", asked=none)
    settings = config.default()
    settings.model.update(made.config.model)
    settings.model.mean, settings.model.std = (0.5,) * 3, (0.5,) * 3
    with pytest.raises(UserError, match="model.standardize is True and .*model.mean"):
        config.check(settings)


@pytest.mark.parametrize(
    ("field", "value"), [("standardize", True), ("shortcut", "raw")]
)
def test_weights_of_another_function_are_refused(field, value):
    """The arrays are the same."""
    expected, stored = described("preact"), described("preact", **{field: value})
    with pytest.raises(UserError, match=f"--config.model.{field}={value!r}"):
        fitting.check_function(expected, stored.to_dict(), "runs/x")


def test_deepminds_normalisation_follows_the_classes(monkeypatch):
    made = read(ones("deepmind", num_classes=100), monkeypatch)
    assert made.config.model.mean == DEEPMIND[100]["mean"]
    with pytest.raises(UserError, match="conventions .*dm_wide.*--mean and --std of"):
        read(ones("deepmind", num_classes=200), monkeypatch)


@pytest.mark.parametrize(
    ("kind", "who"),
    [
        ("preact", "none .Andriushchenko2020.*0.2471,0.2435,0.2616 .Rice2020"),
        ("small", "none .Sehwag2021.*cifar10 .RATIO.*0.2023,0.1994,0.2010"),
    ],
)
def test_where_authors_differ_normalisation_must_be_given(kind, who, monkeypatch):
    with pytest.raises(UserError, match=f"does not say how.*{who}"):
        read(ones(kind), monkeypatch)
    flags = {"asked": normalization.parse("cifar10", None, None)}
    assert read(ones(kind), monkeypatch, **flags).config.model.std == CIFAR10["std"]


def test_what_shortcuts_see_is_assumed_by_the_final_norm_unless_said(monkeypatch):
    flags = {"asked": normalization.parse("none", None, None), "activation": "relu"}
    for kind, usual in (("preact", "active"), ("preact without norm", "raw")):
        made = read(ones(kind), monkeypatch, **flags)
        assert made.config.model.shortcut == usual
        (said,) = made.record["assumed"]
        assert said.startswith(f"shortcut: {usual} (no file says it): --arch=preact")
        assert made.record["arch"] == KINDS[kind][0]
    arch = "preact_resnet18_nonorm"
    made = read(ones("preact without norm"), monkeypatch, arch=arch, **flags)
    assert made.config.model.shortcut == "active" and not made.record["assumed"]
    # An export of this project says it.
    metadata = {"atebm_jax.shortcut": "active"}
    made = read(ones("preact without norm"), monkeypatch, metadata, **flags)
    assert made.record["arch"] == arch and not made.record["assumed"]
    with pytest.raises(UserError, match="model.shortcut .*'sideways'.*active, raw"):
        metadata = {"atebm_jax.shortcut": "sideways"}
        read(ones("preact"), monkeypatch, metadata, **flags)
    with pytest.raises(UserError, match="does not fit --arch=preact_resnet18.*missing"):
        read(ones("preact without norm"), monkeypatch, arch="preact_resnet18", **flags)


def test_export_says_what_shortcuts_see(monkeypatch, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    flags = {"asked": normalization.parse("none", None, None)}
    arch = "preact_resnet18_nonorm"
    made = read(ones("preact without norm"), monkeypatch, arch=arch, **flags)
    importing.write(made, tmp_path / "imported")
    exporting.export(str(tmp_path / "imported"), str(tmp_path / "w.st"))
    with safetensors.safe_open(tmp_path / "w.st", "numpy") as file:
        metadata = file.metadata()
    assert metadata["atebm_jax.shortcut"] == "active"
    assert metadata["atebm_jax.arch"] == arch


def test_jems_classifier_is_read_from_its_training_state(monkeypatch):
    """Its network is under `f`, whose last layer and the energy's nothing uses."""
    arrays = ones("jem")
    tree = {f"f.{name}": value for name, value in arrays.items()}
    head = {n: v for n, v in arrays.items() if n.startswith("linear")}
    tree |= {n.replace("linear", "class_output"): 2 * v for n, v in head.items()}
    tree |= {"energy_output.weight": np.ones((1, 64)), "energy_output.bias": np.ones(1)}
    state = {"model_state_dict": tree, "replay_buffer": np.ones((9, 3, 32, 32))}
    made = read(state, monkeypatch)
    assert made.config.model.mean == made.config.model.std == (0.5, 0.5, 0.5)
    assert made.config.model.name == "jem_wide_resnet"
    (said,) = made.record["assumed"]
    assert said.startswith("input normalisation: mean [0.5, 0.5, 0.5]")
    assert made.variables["params"]["fc"]["kernel"].max() == 2
    with pytest.raises(UserError, match="a jem_wide_resnet has leaky_relu"):
        read(state, monkeypatch, activation="relu")


def test_networks_of_other_sizes_are_refused(monkeypatch):
    preact = {n: v for n, v in ones("preact").items() if "layer3" not in n}
    with pytest.raises(UserError, match="preact_resnet of a size .*not built here"):
        read(preact, monkeypatch)
    extra = {"layer1.0.conv3.weight": np.ones((4, 4, 1, 1), np.float32)}
    with pytest.raises(UserError, match="preact_resnet of a size .*not built here"):
        read(ones("preact") | extra, monkeypatch)
    wider = ones("deepmind")
    wider["layer.1.block.0.conv_0.weight"] = np.ones((48, 16, 3, 3), np.float32)
    with pytest.raises(UserError, match="does not fit .*other shapes: 1 .*conv_0"):
        read(wider, monkeypatch)


def test_several_networks_that_act_as_one_are_refused(monkeypatch):
    """As Chen2020 (ensemble), Bai2024 (mixture) and Kang2021 (sequence) are saved."""

    def under(prefix, arrays):
        return {f"{prefix}.{name}": array for name, array in arrays.items()}

    small, wide = ones("small"), ones("deepmind")
    ensemble = under("branch1", small) | under("branch2", small)
    ensemble |= under("models.0", small) | under("models.1", small)
    ensemble |= {"mu": np.ones((1, 3, 1, 1)) / 2, "sigma": np.ones((1, 3, 1, 1)) / 2}
    with pytest.raises(UserError, match="holds several networks.*--entry=branch1 or"):
        read(ensemble, monkeypatch)
    mixture = under("rob_model", wide)
    mixture["std_model.root.conv.weight"] = np.ones((8, 3, 7, 7), np.float32)
    with pytest.raises(UserError, match="left over: 1 .std_model.*alone.*=rob_model"):
        read(mixture, monkeypatch)
    sequence = under("0", {n: x for n, x in wide.items() if "logits" not in n})
    sequence["1.fc.weight"] = np.ones((64, 64), np.float32)
    with pytest.raises(UserError, match="missing: 2 .logits.*left over: 1 .1.fc.weigh"):
        read(sequence, monkeypatch)


@pytest.mark.parametrize(
    ("kind", "field", "value", "message"),
    [
        ("deepmind", "depth", 12, "6n \\+ 4"),
        ("jem", "depth", 4, "6n \\+ 4"),
        ("jem", "widen_factor", 0, "widen_factor is 0"),
        ("ra", "blocks", "1-2", "blocks is '1-2': expected 3 positive.*16-16-16"),
        ("ra", "widths", "8-x-1-1", "widths is '8-x-1-1': expected 4 positive"),
        ("ra", "widths", "8-0-1-1", "expected 4 positive"),
        ("ra", "blocks", "900-1-1", "at most 500 blocks"),
        ("ra for imagenet", "widths", "8-4-8-8-8", "widths is .*multiples of 8"),
        ("ra for imagenet", "blocks", "1-1-1", "expected 4 positive"),
        ("ra", "activation", "tanh", "'tanh'.*relu, swish, gelu"),
        ("preact", "depth", 50, "depth is 50.*18 or 34"),
        ("preact", "shortcut", "", "model.shortcut.*active, raw"),
        ("deepmind's preact", "depth", 101, "depth is 101.*18 or 34"),
        ("small", "depth", 20, "depth is 20.*18, 34, 50, 101"),
    ],
)
def test_network_that_cannot_be_built_is_refused(kind, field, value, message):
    model = described(kind)
    model[field] = value
    with pytest.raises(UserError, match=message):
        models.build(model)


@pytest.mark.parametrize(
    ("kind", "unit"), [("deepmind", 4), ("ra", 4), ("deepmind's preact", 8)]
)
def test_images_that_deepminds_padding_does_not_fit_are_refused(kind, unit):
    network = models.build(described(kind))
    models.variable_shapes(network, (unit, 3 * unit, 3))
    message = f"image_shape .*multiples of {unit} pixels for"
    for side in (1, unit - 1, unit + 2):
        with pytest.raises(UserError, match=message):
            models.variable_shapes(network, (side, unit, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_remat_bfloat16_and_batch_statistics_are_there(kind):
    network = models.build(described(kind))
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    weights = jax.eval_shape(network.init, jax.random.key(0), images)
    again, half = network.clone(remat=True), network.clone(dtype=jnp.bfloat16)
    assert jax.eval_shape(again.init, jax.random.key(0), images) == weights

    def gradient_of(network):
        score = lambda v, x: network.apply(v, x).sum()
        return str(jax.make_jaxpr(jax.grad(score))(weights, images))

    assert ["remat" in gradient_of(n) for n in (network, again)] == [False, True]
    # Flax's normalisation leaves bfloat16 images and float32 statistics to promotion.
    with jax.numpy_dtype_promotion("standard"):
        assert "bf16" in str(jax.make_jaxpr(half.apply)(weights, images))
        logits = jax.eval_shape(half.apply, weights, images)
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
    trained = lambda v, x: network.apply(v, x, train=True, mutable=["batch_stats"])
    _, changed = jax.eval_shape(trained, weights, images)
    assert changed.get("batch_stats") == weights.get("batch_stats")
    assert ("batch_stats" in weights) == (kind != "jem")
