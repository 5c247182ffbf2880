"""Our networks against timm's and torchvision's, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch_networks
import torch_small

from atebm_jax import archs, convert, models
from atebm_jax.convert import names
from atebm_jax.models import convnext

slow = pytest.mark.slow

# timm's name, ours, image size (height, width).
CASES = [
    pytest.param("convnext_tiny", "convnext_tiny", (64, 64), marks=slow),
    ("convnext_tiny_cvst", "convnext_tiny_cvst", (75, 50)),
    ("vit_small_patch16_224", "vit_s", (96, 64)),
    ("vit_small_patch16_224_cvst", "vit_s_cvst", (64, 64)),
    pytest.param("convnext_base", "convnext_base", (64, 64), marks=slow),
    pytest.param("convnext_base_cvst", "convnext_base_cvst", (64, 64), marks=slow),
    pytest.param("vit_base_patch16_224", "vit_b", (224, 224), marks=slow),
    pytest.param("vit_base_patch16_224_cvst", "vit_b_cvst", (96, 96), marks=slow),
]
# Of the same name in timm.
RESNETS = [
    ("resnet18", (64, 64)),
    ("resnet50", (75, 50)),
    pytest.param("resnet34", (64, 64), marks=slow),
    pytest.param("resnet101", (64, 64), marks=slow),
    pytest.param("wide_resnet50_2", (64, 64), marks=slow),
]


def build(name, num_classes=1000, **options):
    """Ours, without normalisation, which timm's networks leave to their data."""
    block = archs.model_config(name, num_classes=num_classes, mean=(), std=())
    return block.name, models.build(block).clone(**options)


@pytest.mark.parametrize(("theirs", "ours", "size"), CASES)
def test_logits_and_gradients_are_timms(theirs, ours, size):
    options = {"dynamic_img_size": True} if theirs.startswith("vit") else {}
    network = torch_networks.create(theirs, num_classes=20, **options)
    if theirs.endswith("_cvst") and theirs.startswith("vit"):
        # Its patches may then have any size.
        network.patch_embed.strict_img_size = False
    images = np.random.default_rng(0).random((2, *size, 3), np.float32)
    expected = torch_networks.logits_and_gradient(network, images, 3)
    family, twin = build(ours, num_classes=20)
    weights = convert.from_torch(family, torch_networks.state_dict(network))
    made = reference.logits_and_gradient(twin, weights, images, 3)
    assert expected[0].std() > 0.1
    for actual, value in zip(made, expected, strict=True):
        reference.assert_relative(actual, value, 1e-4)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(("name", "size"), RESNETS)
def test_resnets_are_timms_to_rounding_in_double_precision(name, size):
    """In float32 units land on the other side of zero, others on every CPU."""
    network = torch_networks.create(name, num_classes=20).double()
    images = np.random.default_rng(1).random((2, *size, 3))
    expected = torch_networks.logits_and_gradient(network, images, 3)
    assert expected[0].std() > 0.1
    family, twin = build(name, num_classes=20, dtype=jnp.float64)
    with jax.enable_x64(True):
        weights = convert.from_torch(family, torch_networks.state_dict(network))
        made = reference.logits_and_gradient(twin, weights, images, 3)
    for actual, value in zip(made, expected, strict=True):
        reference.assert_relative(actual, value, 1e-10)


def test_sparse_convnext_is_timms_made_sparse(monkeypatch):
    """As the authors of MeanSparse put their layers into it."""
    torch, _ = torch_networks.torch_and_timm()
    depths, widths = (1, 1, 1, 1), (8, 16, 32, 64)
    network = torch_networks.create(
        "convnext_tiny", num_classes=20, depths=depths, dims=widths
    )
    for stage, width in zip(network.stages, widths, strict=True):
        before, last = (
            torch_small.mean_sparse(4 * width),
            torch_small.mean_sparse(width),
        )
        for block in stage.blocks:
            block.mlp.act = torch.nn.Sequential(before, block.mlp.act)
            block.drop_path = torch.nn.Sequential(block.drop_path, last)
        for layer in (before, last):
            for name in ("momentum", "epsilon"):
                layer.register_buffer(name, torch.tensor(0.0))
    torch_networks.randomise(network)
    for name, value in network.named_buffers():
        if name.endswith("threshold"):
            value.fill_(0.5)
    network = network.double()
    images = np.random.default_rng(0).random((2, 32, 48, 3))
    expected = torch_networks.logits_and_gradient(network, images, 3)
    monkeypatch.setitem(convnext.SIZES, "large", (depths, widths))
    family, twin = build("mean_sparse_convnext_large", num_classes=20)
    # Flax's normalisation leaves float64 and float32 to promotion.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        weights = convert.from_torch(family, torch_networks.state_dict(network))
        twin = twin.clone(dtype=jnp.float64)
        made = reference.logits_and_gradient(twin, weights, images, 3)
    for actual, value in zip(made, expected, strict=True):
        reference.assert_relative(actual, value, 1e-10)
    exported = convert.to_torch(family, weights)
    assert names.recognise({n: x.shape for n, x in exported.items()})[0] == family
    exported |= names.known(family).beside(exported)
    state = {name: torch.tensor(value) for name, value in exported.items()}
    network.load_state_dict(state, strict=True)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("resnet18", "resnet18"),
        ("resnet50", "resnet50"),
        ("convnext_tiny", "convnext_tiny"),
        ("convnext_tiny_cvst", "convnext_tiny_cvst"),
        ("vit_small_patch16_224", "vit_s"),
        ("vit_small_patch16_224_cvst", "vit_s_cvst"),
    ],
)
def test_our_weights_load_into_timm_strictly(theirs, ours):
    torch, _ = torch_networks.torch_and_timm()
    network = torch_networks.create(theirs, num_classes=20)
    family, twin = build(ours, num_classes=20)
    weights = reference.random_variables(twin, (64, 64, 3))
    if ours.startswith("vit"):
        weights["params"]["pos_embed"] = np.ones((1, 197, 384), np.float32)
    exported = convert.to_torch(family, weights)
    network.load_state_dict(
        {name: torch.tensor(value) for name, value in exported.items()}, strict=True
    )
    back = convert.from_torch(family, exported)
    reference.assert_same_bits(back, weights)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        pytest.param("resnet50", "resnet50", marks=slow),
        ("convnext_tiny", "convnext_tiny"),
        pytest.param("vit_b_16", "vit_b", marks=slow),
    ],
)
def test_torchvisions_names_are_read(theirs, ours):
    torch, _ = torch_networks.torch_and_timm()
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    network = getattr(torchvision.models, theirs)(num_classes=20).eval()
    torch_networks.randomise(network)
    size = 224 if theirs.startswith("vit") else 64
    images = np.random.default_rng(0).random((1, size, size, 3), np.float32)
    expected = torch_networks.logits_and_gradient(network, images, 3)
    family, twin = build(ours, num_classes=20)
    weights = convert.from_torch(family, torch_networks.state_dict(network))
    made = reference.logits_and_gradient(twin, weights, images, 3)
    for actual, value in zip(made, expected, strict=True):
        reference.assert_relative(actual, value, 1e-4)
