"""The ImageNet networks by themselves: shapes, sizes, dtypes, modes and refusals."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from atebm_jax import UserError, archs, energy, models
from atebm_jax.convert import names
from atebm_jax.models import resnet
from atebm_jax.models.family import IMAGENET

# Small networks of each family, and the features they pool.
NETWORKS = [
    ("wrn16_4", {"depth": 10, "widen_factor": 1}, 64),
    ("dm_wrn28_10", {"depth": 10, "widen_factor": 1}, 64),
    ("mean_sparse_wrn70_16", {"depth": 10, "widen_factor": 1}, 64),
    ("mean_sparse_ra_wrn70_16", {"blocks": "1-1-1", "widths": "8-12-16-24"}, 24),
    # Groups of equal width, of which the second halves the resolution.
    ("ra_wrn70_16", {"blocks": "1-1-1", "widths": "8-8-8-16"}, 16),
    ("wrn34_r", {"blocks": "1-1-1", "widths": "8-12-16-24"}, 24),
    ("wrn_a4", {"blocks": "1-1-1", "widths": "8-12-16-24"}, 24),
    ("ra_wrn101_2", {"blocks": "1-1-1-1", "widths": "8-8-16-24-32"}, 32),
    ("cosine_wrn34_20", {"depth": 10, "widen_factor": 1}, 64),
    ("pssilu_wrn28_10", {"depth": 10, "widen_factor": 1}, 64),
    ("jem_wrn28_10", {"depth": 10, "widen_factor": 1}, 64),
    ("preact_resnet18", {}, 512),
    ("dm_preact_resnet18", {}, 512),
    ("small_resnet18", {}, 512),
    ("resnet18", {}, 512),
    ("convnext_tiny", {}, 768),
    ("convnext_tiny_cvst", {}, 768),
    ("mean_sparse_convnext_large", {"size": "tiny"}, 768),
    ("vit_s", {}, 384),
    ("vit_s_cvst", {"position_grid": 2}, 384),
    ("xcit_s12", {"depth": 1}, 384),
    ("swin_t", {"window": 1, "position_grid": 8}, 768),
    (
        "mean_sparse_swin_l",
        {"size": "tiny", "window": 1, "position_grid": 8},
        768,
    ),
]

# An XCiT is shallow by a field, and windows of 2 fit small images.
SMALL = {
    "xcit_s12": {"depth": 1},
    "xcit_s12_p4": {"depth": 1},
    "swin_t": {"window": 2, "position_grid": 8},
}

# Parameters in millions, as timm counts them (ConvStems: as the reference does; those
# for small images: products of the published sizes, summed by hand).
MILLIONS = {
    "wrn28_10": 36.479194,
    "wrn34_10": 46.160474,
    "wrn70_16": 266.796506,
    # Of 34-20, without ten biases; of 28-10, with the activation's two numbers.
    "cosine_wrn34_20": 184.531664,
    "pssilu_wrn28_10": 36.479196,
    "dm_wrn28_10": 36.479194,
    "dm_wrn34_10": 46.160474,
    "dm_wrn34_20": 184.531674,
    "dm_wrn70_16": 266.796506,
    "dm_wrn82_8": 79.125466,
    "dm_wrn94_16": 365.915610,
    "dm_wrn106_16": 415.475162,
    "mean_sparse_wrn70_16": 266.796506,
    "mean_sparse_wrn94_16": 365.915610,
    "mean_sparse_ra_wrn70_16": 267.240802,
    "ra_wrn70_16": 267.240802,
    "wrn34_r": 68.116698,
    "wrn_a4": 147.291738,
    "ra_wrn101_2": 104.065776,
    "jem_wrn28_10": 36.471338,
    "small_resnet18": 11.173962,
    "small_resnet34": 21.282122,
    "small_resnet50": 23.520842,
    "preact_resnet18": 11.172170,
    "preact_resnet18_raw": 11.172170,
    "preact_resnet18_nonorm": 11.171146,
    "preact_resnet18_nonorm_raw": 11.171146,
    "dm_preact_resnet18": 12.548426,
    "resnet18": 11.689512,
    "resnet34": 21.797672,
    "resnet50": 25.557032,
    "resnet101": 44.549160,
    "wide_resnet50_2": 68.883240,
    "wide_resnet50_4": 223.439144,
    "convnext_tiny": 28.589128,
    "convnext_small": 50.223688,
    "convnext_base": 88.591464,
    "convnext_large": 197.767336,
    "convnext_tiny_cvst": 28.627432,
    "convnext_small_cvst": 50.261992,
    "convnext_base_cvst": 88.753416,
    "convnext_large_cvst": 198.134680,
    "mean_sparse_convnext_large": 197.767336,
    "vit_s": 22.050664,
    "vit_b": 86.567656,
    "vit_s_cvst": 22.777576,
    "vit_b_cvst": 87.147112,
    "xcit_s12": 26.253304,
    "xcit_m12": 46.401160,
    "xcit_l12": 103.792648,
    "xcit_s12_p4": 25.872154,
    "xcit_m12_p4": 45.893290,
    "xcit_l12_p4": 103.031338,
    "swin_t": 28.288354,
    "swin_s": 49.606258,
    "swin_b": 87.768224,
    "swin_b_mimir": 87.768224,
    "swin_l": 196.532476,
    "mean_sparse_swin_l": 196.532476,
}


@pytest.fixture
def shallow(monkeypatch):
    reference.shallow(monkeypatch)


def shapes_of(network, size=(64, 64)):
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    return images, jax.eval_shape(network.init, jax.random.key(0), images)


@pytest.mark.parametrize("name", archs.ARCHS)
def test_every_architecture_builds_with_its_number_of_parameters(name):
    block = archs.model_config(name)
    size = (224, 224) if block.name.endswith("swin") else (64, 64)
    _, weights = shapes_of(models.build(block), size)
    assert archs.name_of(block) == name
    count = sum(x.size for x in jax.tree.leaves(weights["params"]))
    if name in MILLIONS:
        assert count == round(MILLIONS[name] * 1e6)
    dtypes = {x.dtype for x in jax.tree.leaves(weights)}
    assert dtypes == {jnp.dtype("float32")}
    flat = flax.traverse_util.flatten_dict(weights, sep="/")
    exported = {
        names.one_to_torch(block.name, path, np.broadcast_to(np.False_, x.shape))[0]
        for path, x in flat.items()
    }
    assert len(exported) == len(flat)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("size", [(64, 64), (96, 32), (224, 224)])
@pytest.mark.parametrize(("name", "overrides", "width"), NETWORKS)
def test_any_image_size_fits_and_features_are_pooled(name, overrides, width, size):
    network = models.build(archs.model_config(name, num_classes=7, **overrides))
    images, weights = shapes_of(network)
    for features, expected in ((False, 7), (True, width)):
        made = jax.eval_shape(
            lambda v, x, f=features: network.apply(v, x, features=f), weights, images
        )
        assert (made.shape, made.dtype) == ((2, expected), jnp.float32)
    other = jax.ShapeDtypeStruct((3, *size, 3), jnp.float32)
    logits = jax.eval_shape(network.apply, weights, other)
    assert logits.shape == (3, 7)


def test_sizes_that_do_not_fit_are_refused():
    network = models.build(archs.model_config("vit_s"))
    with pytest.raises(UserError, match=r"image_shape .*\(72, 64\).*multiples of 16"):
        shapes_of(network, (72, 64))
    network = models.build(archs.model_config("convnext_tiny"))
    with pytest.raises(UserError, match=r"\(28, 64\).*at least 32"):
        shapes_of(network, (28, 64))


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        pytest.param("convnext_tiny", marks=pytest.mark.slow),
        "convnext_tiny_cvst",
        "vit_s",
        "xcit_s12_p4",
        "swin_t",
    ],
)
def test_bfloat16_computes_nearly_the_same(name):
    overrides = SMALL.get(name, {})
    network = models.build(archs.model_config(name, num_classes=7, **overrides))
    weights = reference.random_variables(network, (32, 32, 3))
    images = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)
    exact = jax.jit(network.apply)(weights, images)
    # Flax's normalisation leaves bfloat16 images and float32 statistics to promotion.
    with jax.numpy_dtype_promotion("standard"):
        half = network.clone(dtype=jnp.bfloat16)
        lowered = jax.jit(half.apply).lower(weights, images)
        text, rounded = lowered.as_text(), lowered.compile()(weights, images)
    assert rounded.dtype == jnp.float32
    assert "bf16" in text
    away = np.abs(np.asarray(rounded) - exact).max() / np.abs(exact).max()
    assert 1e-5 < away < 0.05


def score_gradients(network, weights, images):
    def score(params, x):
        logits = network.apply(weights | {"params": params}, x)
        return energy.score(logits).sum()

    return jax.jit(jax.grad(score, argnums=(0, 1)))(weights["params"], images)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("wrn16_4", {"depth": 10, "widen_factor": 1}),
        ("resnet18", {}),
        pytest.param("vit_s", {}, marks=pytest.mark.slow),
        pytest.param("convnext_tiny", {}, marks=pytest.mark.slow),
        ("xcit_s12_p4", SMALL["xcit_s12_p4"]),
        ("swin_t", SMALL["swin_t"]),
    ],
)
def test_rematerialisation_changes_no_gradient(name, overrides):
    network = models.build(archs.model_config(name, num_classes=5, **overrides))
    again = models.build(
        archs.model_config(name, num_classes=5, **overrides, remat=True)
    )
    weights = reference.random_variables(network, (32, 32, 3))
    images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    kept = score_gradients(network, weights, images)
    made = score_gradients(again, weights, images)
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(kept))
    reference.assert_close(made, kept, atol=1e-5 * scale)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    "name", ["resnet18", "convnext_tiny", "vit_s", "xcit_s12", "swin_t"]
)
def test_rematerialised_blocks_keep_their_parameters(name):
    plain, again = (
        models.build(archs.model_config(name, remat=remat, **SMALL.get(name, {})))
        for remat in (False, True)
    )
    assert shapes_of(plain)[1] == shapes_of(again)[1]
    images, weights = shapes_of(plain)
    if "batch_stats" in weights:
        jax.eval_shape(
            lambda v, x: again.apply(v, x, train=True, mutable=["batch_stats"]),
            weights,
            images,
        )

    def saved(network):
        score = lambda v, x: network.apply(v, x).sum()
        return "remat" in str(jax.make_jaxpr(jax.grad(score))(weights, images))

    assert (saved(plain), saved(again)) == (False, True)


@pytest.mark.usefixtures("shallow")
def test_training_mode_of_a_resnet_updates_its_statistics():
    network = models.build(archs.model_config("resnet18", num_classes=5))
    weights = reference.random_variables(network, (32, 32, 3))
    images = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)
    logits, new = jax.jit(
        lambda v, x: network.apply(v, x, train=True, mutable=["batch_stats"])
    )(weights, images)
    assert np.abs(logits - jax.jit(network.apply)(weights, images)).max() > 0.01
    old = weights["batch_stats"]
    for module in ("bn1", "layer1_0", "layer4_0"):
        assert reference.max_difference(new["batch_stats"][module], old[module]) > 1e-3
    # One weight-0.1 step towards the batch's own mean.
    kernel = np.asarray(weights["params"]["conv1"]["kernel"])
    pixels = (images - IMAGENET["mean"]) / IMAGENET["std"]
    seen = jax.lax.conv_general_dilated(
        jnp.asarray(pixels, jnp.float32),
        jnp.asarray(kernel),
        (2, 2),
        ((3, 3), (3, 3)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    expected = 0.9 * old["bn1"]["mean"] + 0.1 * seen.mean(axis=(0, 1, 2))
    np.testing.assert_allclose(new["batch_stats"]["bn1"]["mean"], expected, atol=1e-5)


def test_stride_of_a_bottleneck_sits_in_its_middle_convolution():
    block = resnet.Block(4, 16, 2, True, jax.nn.relu, jnp.float32)
    images = jax.ShapeDtypeStruct((1, 8, 8, 16), jnp.float32)
    _, state = jax.eval_shape(
        lambda x: block.init_with_output(
            jax.random.key(0), x, False, capture_intermediates=True
        ),
        images,
    )
    sizes = {
        name: value["__call__"][0].shape[1]
        for name, value in state["intermediates"].items()
        if name.startswith("conv")
    }
    assert sizes == {"conv1": 8, "conv2": 4, "conv3": 4}


@pytest.mark.usefixtures("shallow")
def test_position_embedding_is_interpolated_to_the_images_grid():
    network = models.build(archs.model_config("vit_s", position_grid=2, num_classes=5))
    weights = reference.random_variables(network, (32, 32, 3))
    flat = weights["params"]["pos_embed"].at[:, 1:].set(0.3)
    weights["params"]["pos_embed"] = flat
    # A constant embedding stays what it is on any grid: as if kept for that grid.
    images = np.random.default_rng(0).random((2, 48, 64, 3), np.float32)
    wide = jnp.full((1, 1 + 5 * 5, 384), 0.3).at[:, 0].set(flat[:, 0])
    other = network.clone(position_grid=5)
    changed = {"params": weights["params"] | {"pos_embed": wide}}
    np.testing.assert_allclose(
        jax.jit(network.apply)(weights, images),
        jax.jit(other.apply)(changed, images),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("resnet50", "depth", 51, "depth is 51.*18, 34, 50, 101"),
        ("resnet50", "base_width", 0, "base_width is 0"),
        ("resnet18", "base_width", 128, "base_width is 128.*depth 18"),
        ("resnet50", "num_classes", 0, "num_classes is 0"),
        ("resnet50", "activation", "tanh", "'tanh'.*relu, swish, gelu"),
        ("convnext_tiny", "size", "huge", "'huge' of a ConvNeXt.*tiny, small"),
        ("convnext_tiny", "stem", "conf", "'conf'.*patch, conv"),
        ("convnext_tiny", "num_classes", -1, "num_classes is -1"),
        ("vit_s", "size", "large", "'large' of a ViT.*small, base"),
        ("vit_s", "stem", "", "''.*patch, conv"),
        ("vit_s", "position_grid", 0, "position_grid is 0"),
        ("vit_s", "dtype", "float16", "'float16'.*float32, bfloat16"),
    ],
)
def test_network_that_cannot_be_built_is_refused(name, field, value, message):
    with pytest.raises(UserError, match=message):
        models.build(archs.model_config(name, **{field: value}))


def test_unknown_architecture_and_field_are_refused():
    with pytest.raises(UserError, match="'resnet52'.*resnet50, resnet101"):
        archs.arch("resnet52")
    with pytest.raises(UserError, match="no field 'classes'.*num_classes"):
        archs.model_config("resnet50", classes=3)


def test_architecture_is_found_whatever_its_classes_and_normalisation():
    block = archs.model_config("convnext_base", num_classes=10, **IMAGENET)
    assert archs.name_of(block) == "convnext_base"
    assert archs.name_of(archs.model_config("wrn34_10", depth=40)) is None


def test_cifar_networks_have_the_reference_s_normalisation_to_the_last_digit():
    values = archs.arch("wrn34_10")
    assert (values["mean"], values["std"]) == (reference.MEAN, reference.STD)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wrn34_10", "wide_resnet-34-10"),
        ("wide_resnet50_4", "resnet-50-256"),
        ("convnext_large_cvst", "convnext-large-conv"),
        ("vit_s", "vit-small-patch"),
        ("dm_wrn70_16", "dm_wide_resnet-70-16"),
        ("ra_wrn70_16", "ra_wide_resnet-30-31-10-96-216-432-864"),
        ("xcit_m12_p4", "xcit-medium-12-4"),
        ("swin_b", "swin-base-7-1e-05"),
    ],
)
def test_network_is_described_by_what_sizes_it(name, text):
    assert archs.describe(archs.model_config(name)) == text
