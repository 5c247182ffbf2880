"""PyTorch weights in: names, layouts, and the same function afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from atebm_jax import UserError, convert
from atebm_jax.models import wide_resnet


def test_names_and_layouts_are_translated():
    arrays = {
        "conv1.weight": np.arange(16 * 3 * 9).reshape(16, 3, 3, 3),
        "block2.layer.11.bn2.weight": np.ones(4),
        "block2.layer.11.bn2.bias": np.zeros(4),
        "block2.layer.11.bn2.running_var": np.full(4, 2.0),
        "block2.layer.11.bn2.num_batches_tracked": np.array(7),
        "block3.layer.0.convShortcut.weight": np.ones((8, 4, 1, 1)),
        "fc.weight": np.arange(20).reshape(10, 2),
        "fc.bias": np.arange(10),
    }
    made = convert.from_torch("wide_resnet", arrays)
    params = made["params"]
    assert params["conv1"]["kernel"].shape == (3, 3, 3, 16)
    assert params["conv1"]["kernel"][1, 2, 0, 5] == arrays["conv1.weight"][5, 0, 1, 2]
    assert set(params["block2_11"]["bn2"]) == {"scale", "bias"}
    np.testing.assert_array_equal(made["batch_stats"]["block2_11"]["bn2"]["var"], 2.0)
    assert params["block3_0"]["shortcut"]["kernel"].shape == (1, 1, 4, 8)
    np.testing.assert_array_equal(params["fc"]["kernel"], arrays["fc.weight"].T)


def test_converted_weights_fit_the_network_exactly(golden):
    made = reference.variables(golden("wrn_state_dict"))
    expected = jax.eval_shape(
        reference.network().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    )
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), made, expected
    )
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    ("name", "shape"), [("conv1.weight_g", (3,)), ("fc.weight", (2, 2, 2)), ("x", ())]
)
def test_unknown_parameter_is_refused_by_name(name, shape):
    with pytest.raises(UserError, match=f"'{name}' with shape"):
        convert.from_torch("wide_resnet", {name: np.zeros(shape)})


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("resnet", "layer1.0.conv1.weight_orig", "no parameter of a resnet.*layer"),
        ("resnet", "gamma", "no parameter of a resnet"),
        ("convnext", "stages.0.blocks.0.attn.weight", "no parameter of a convnext"),
        ("vit", "dist_token", "no parameter of a vit"),
        ("vit", "weight", "no parameter of a vit"),
    ],
)
def test_names_of_no_network_of_the_family_are_refused(family, name, message):
    with pytest.raises(UserError, match=f"'{name}' with shape .*{message}"):
        convert.from_torch(family, {name: np.zeros(3)})


def test_variable_that_no_network_of_the_family_has_is_refused():
    with pytest.raises(UserError, match="'params/fd/kernel'.*no variable of a resnet"):
        convert.to_torch("resnet", {"params": {"fd": {"kernel": np.zeros((2, 2))}}})


def test_one_parameter_under_two_names_is_refused():
    arrays = {"head.fc.bias": np.zeros(3), "classifier.2.bias": np.zeros(3)}
    with pytest.raises(UserError, match="'classifier.2.bias' and 'head.fc.bias' are"):
        convert.from_torch("convnext", arrays)


@pytest.mark.parametrize(
    ("authors", "timms"),
    [
        ("downsample_layers.0.0.weight", "stem.0.weight"),
        ("downsample_layers.2.1.bias", "stages.2.downsample.1.bias"),
        ("stages.2.8.dwconv.weight", "stages.2.blocks.8.conv_dw.weight"),
        ("stages.2.8.norm.bias", "stages.2.blocks.8.norm.bias"),
        ("stages.2.8.pwconv2.weight", "stages.2.blocks.8.mlp.fc2.weight"),
        ("stages.2.8.gamma", "stages.2.blocks.8.gamma"),
        ("norm.weight", "head.norm.weight"),
        ("head.bias", "head.fc.bias"),
    ],
)
def test_names_of_the_convnext_authors_are_read(authors, timms):
    value = np.arange(3.0)
    made, expected = (
        convert.from_torch("convnext", {name: value}) for name in (authors, timms)
    )
    assert jax.tree.structure(made) == jax.tree.structure(expected)


def test_weights_survive_the_way_there_and_back(golden):
    arrays = golden("wrn_state_dict")
    made = convert.to_torch("wide_resnet", convert.from_torch("wide_resnet", arrays))
    assert made.keys() == arrays.keys()
    for name, value in made.items():
        np.testing.assert_array_equal(value, arrays[name])
        assert value.flags.c_contiguous


def torch_network(depth, width, classes, activation, seed):
    """A plain pre-activation WideResNet in PyTorch with random weights everywhere."""
    torch = pytest.importorskip("torch")
    nn, functional = torch.nn, torch.nn.functional
    act = {
        "relu": functional.relu,
        "swish": functional.silu,
        "gelu": functional.gelu,
    }[activation]

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.bn1 = nn.BatchNorm2d(inputs)
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.convShortcut = None
            if inputs != outputs:
                self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

        def forward(self, x):
            active = act(self.bn1(x))
            y = self.conv2(act(self.bn2(self.conv1(active))))
            return y + (self.convShortcut(active) if self.convShortcut else x)

    class Group(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            blocks = [Block(inputs, outputs, stride)]
            blocks += [Block(outputs, outputs, 1) for _ in range((depth - 4) // 6 - 1)]
            self.layer = nn.Sequential(*blocks)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = [16, 16 * width, 32 * width, 64 * width]
            self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
            self.block1 = Group(sizes[0], sizes[1], 1)
            self.block2 = Group(sizes[1], sizes[2], 2)
            self.block3 = Group(sizes[2], sizes[3], 2)
            self.bn1 = nn.BatchNorm2d(sizes[3])
            self.fc = nn.Linear(sizes[3], classes)

        def forward(self, x):
            x = self.conv1(x)
            for group in (self.block1, self.block2, self.block3):
                x = group.layer(x)
            return self.fc(act(self.bn1(x)).mean(dim=(2, 3)))

    torch.manual_seed(seed)
    network = Network().eval()
    with torch.no_grad():
        for name, value in [*network.named_parameters(), *network.named_buffers()]:
            if value.is_floating_point() and value.ndim == 1:
                noise = 0.2 * torch.randn_like(value)
                positive = name.endswith(("running_var", "weight"))
                value.copy_(1 + noise.abs() if positive else noise)
    return torch, network


@pytest.mark.parametrize(
    ("depth", "width", "classes", "activation", "size"),
    [(10, 1, 3, "relu", 16), (16, 2, 7, "swish", 12), (10, 1, 3, "gelu", 16)],
)
def test_random_network_computes_what_it_did_in_torch(
    depth, width, classes, activation, size
):
    torch, theirs = torch_network(depth, width, classes, activation, seed=depth)
    images = np.random.default_rng(0).random((4, size, size, 3), np.float32)
    pixels = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
    logits = theirs(pixels)
    logits[:, 1].sum().backward()
    arrays = {name: value.numpy() for name, value in theirs.state_dict().items()}
    weights = convert.from_torch("wide_resnet", arrays)
    ours = wide_resnet.network(depth, width, num_classes=classes, activation=activation)

    @jax.jit
    def logits_and_gradient(x):
        def score(x):
            made = ours.apply(weights, x)
            return made[:, 1].sum(), made

        return jax.grad(score, has_aux=True)(x)

    gradient, made = logits_and_gradient(images)
    scale = np.abs(logits.detach().numpy()).max()
    np.testing.assert_allclose(
        made, logits.detach().numpy(), rtol=0, atol=2e-6 * max(scale, 1)
    )
    expected = pixels.grad.numpy().transpose(0, 2, 3, 1)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * scale)
