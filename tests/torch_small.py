"""PyTorch networks for small images, from the papers' equations and published names.

A network is a table of its layers by name, and a function that uses them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch_networks

# Layers by dotted name; what a layer's name is looked up with.
Layers = dict[str, Any]
Get = Callable[[str], Any]


def assembled(layers: Layers, forward: Callable[[Get, Any], Any]) -> Any:
    """A module with layers of these names that computes `forward(get, images)`."""
    torch, _ = torch_networks.torch_and_timm()

    class Assembled(torch.nn.Module):
        def forward(self, images: Any) -> Any:
            return forward(self.get_submodule, images)

    network = Assembled()
    for name, layer in layers.items():
        parent = network
        *parts, last = name.split(".")
        for part in parts:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, layer)
    torch.manual_seed(0)
    torch_networks.randomise(network)
    return network.eval()


def activation(name: str) -> Callable[[Any], Any]:
    torch, _ = torch_networks.torch_and_timm()
    functions = torch.nn.functional
    return {
        "relu": functions.relu,
        "swish": functions.silu,
        "gelu": functions.gelu,
        "leaky_relu": lambda x: functions.leaky_relu(x, 0.2),
    }[name]


def conv(inputs: int, outputs: int, side: int, stride: int = 1, **options: Any) -> Any:
    """Padded to the same size at stride 1, without a bias."""
    torch, _ = torch_networks.torch_and_timm()
    options = {"padding": side // 2, "bias": False} | options
    return torch.nn.Conv2d(inputs, outputs, side, stride, **options)


def norm(channels: int) -> Any:
    return pytest.importorskip("torch").nn.BatchNorm2d(channels)


def mean_sparse(channels: int) -> Any:
    """Values close to their channel's mean become the mean (Amini et al., 2024)."""
    torch, _ = torch_networks.torch_and_timm()

    class MeanSparse(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(channels))
            self.register_buffer("running_var", torch.ones(channels))
            self.register_buffer("threshold", torch.tensor(0.0))
            # Of the pass that gathers the statistics.
            self.register_buffer("flag_update_statistics", torch.tensor(0))
            self.register_buffer("batch_num", torch.tensor(0.0))

        def forward(self, x: Any) -> Any:
            # Channels come first in images of convolutional networks, last in tokens.
            shape = (channels, 1, 1) if x.shape[1] == channels else (channels,)
            mean = self.running_mean.reshape(shape).expand_as(x)
            distance = self.threshold * self.running_var.sqrt().reshape(shape)
            return torch.where((x - mean).abs() < distance, mean, x)

    return MeanSparse()


def pssilu() -> Any:
    """x (sigmoid(|a| x) - |b|) / (1 - |b|), a and b learned (Dai et al., 2021)."""
    torch, _ = torch_networks.torch_and_timm()

    class PSSiLU(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alpha = torch.nn.Parameter(torch.ones(1))
            self.beta = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: Any) -> Any:
            sunk = self.beta.abs()
            return x * ((self.alpha.abs() * x).sigmoid() - sunk) / (1 - sunk)

    return PSSiLU()


def linear(inputs: int, outputs: int, bias: bool = True) -> Any:
    return pytest.importorskip("torch").nn.Linear(inputs, outputs, bias)


def corner(x: Any, stride: int) -> Any:
    """What a 3x3 window of TensorFlow's "SAME" sees at even sides."""
    pad = pytest.importorskip("torch").nn.functional.pad
    return pad(x, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))


def deepmind(
    blocks: tuple[int, ...],
    widths: tuple[int, ...],
    act: str,
    squeeze: float = 0.0,
    classes: int = 10,
    threshold: float = 0.0,
) -> Any:
    """DeepMind's WideResNet; with a squeeze ratio RaWideResNet; or sparse."""
    layers: Layers = {"init_conv": conv(3, widths[0], 3)}
    plan = []
    inputs = widths[0]
    for group, (number, width) in enumerate(zip(blocks, widths[1:], strict=True)):
        for index in range(number):
            stride = 2 if group and not index else 1
            name = f"layer.{group}.block.{index}"
            plan.append((name, stride, inputs != width))
            layers[f"{name}.batchnorm_0"] = norm(inputs)
            layers[f"{name}.conv_0"] = conv(inputs, width, 3, stride, padding=0)
            layers[f"{name}.batchnorm_1"] = norm(width)
            layers[f"{name}.conv_1"] = conv(width, width, 3)
            if inputs != width:
                layers[f"{name}.shortcut"] = conv(inputs, width, 1, stride)
            if squeeze:
                inner = round(squeeze * width)
                layers[f"{name}.se.fc1"] = conv(width, inner, 1, bias=True)
                layers[f"{name}.se.fc2"] = conv(inner, width, 1, bias=True)
            if threshold:
                for place, channels in enumerate((inputs, width, width)):
                    layers[f"{name}.meansparse_{place}"] = mean_sparse(channels)
            inputs = width
    layers |= {"batchnorm": norm(inputs), "logits": linear(inputs, classes)}
    if threshold:
        layers["meansparse_end"] = mean_sparse(inputs)
    f = activation(act)

    def sparse(get: Get, name: str, x: Any) -> Any:
        return get(name)(x) if threshold else x

    def block(get: Get, name: str, stride: int, widens: bool, x: Any) -> Any:
        inner = get(f"{name}.batchnorm_0")(x)
        inner = f(sparse(get, f"{name}.meansparse_0", inner))
        y = get(f"{name}.conv_0")(corner(inner, stride))
        y = sparse(get, f"{name}.meansparse_1", get(f"{name}.batchnorm_1")(y))
        y = get(f"{name}.conv_1")(f(y))
        if squeeze:
            gate = activation("relu")(get(f"{name}.se.fc1")(y.mean((2, 3), True)))
            y = y * get(f"{name}.se.fc2")(gate).sigmoid()
        y = y + (get(f"{name}.shortcut")(inner) if widens else x)
        return sparse(get, f"{name}.meansparse_2", y)

    def forward(get: Get, x: Any) -> Any:
        x = get("init_conv")(x)
        for name, stride, widens in plan:
            x = block(get, name, stride, widens, x)
        x = sparse(get, "meansparse_end", get("batchnorm")(x))
        return get("logits")(f(x).mean((2, 3)))

    network = assembled(layers, forward)
    for name, value in network.named_buffers():
        if name.endswith("threshold"):
            value.fill_(threshold)
    return network


def jem(blocks: int, width: int, classes: int = 10) -> Any:
    """JEM's WideResNet with its own last layer."""
    layers: Layers = {"conv1": conv(3, 16, 3, bias=True)}
    plan = []
    inputs = 16
    for group in range(3):
        outputs = 16 * width * 2**group
        for index in range(blocks):
            stride = 2 if group and not index else 1
            name = f"layer{group + 1}.{index}"
            plan.append((name, stride != 1 or inputs != outputs))
            layers[f"{name}.conv1"] = conv(inputs, outputs, 3, bias=True)
            layers[f"{name}.conv2"] = conv(outputs, outputs, 3, stride, bias=True)
            if plan[-1][1]:
                layers[f"{name}.shortcut.0"] = conv(
                    inputs, outputs, 1, stride, bias=True
                )
            inputs = outputs
    layers["linear"] = linear(inputs, classes)
    f = activation("leaky_relu")

    def forward(get: Get, x: Any) -> Any:
        x = get("conv1")(x)
        for name, changes in plan:
            y = get(f"{name}.conv2")(f(get(f"{name}.conv1")(f(x))))
            x = y + (get(f"{name}.shortcut.0")(x) if changes else x)
        return get("linear")(f(x).mean((2, 3)))

    return assembled(layers, forward)


def resnet(
    stages: tuple[int, ...],
    act: str,
    bottleneck: bool = False,
    small: bool = True,
    classes: int = 10,
) -> Any:
    """ResNet for small images, or with torchvision's names for ImageNet."""
    side, stride, shortcut, head = 3, 1, "shortcut", "linear"
    if not small:
        side, stride, shortcut, head = 7, 2, "downsample", "fc"
    layers: Layers = {"conv1": conv(3, 64, side, stride), "bn1": norm(64)}
    plan = []
    inputs = 64
    for stage, number in enumerate(stages):
        inner = 64 * 2**stage
        outputs = 4 * inner if bottleneck else inner
        for index in range(number):
            step = 2 if stage and not index else 1
            name = f"layer{stage + 1}.{index}"
            shapes = [(inputs, inner, 3, step), (inner, outputs, 3, 1)]
            if bottleneck:
                shapes = [(inputs, inner, 1, 1), (inner, inner, 3, step)]
                shapes.append((inner, outputs, 1, 1))
            for place, shape in enumerate(shapes, start=1):
                layers[f"{name}.conv{place}"] = conv(*shape)
                layers[f"{name}.bn{place}"] = norm(shape[1])
            changes = step != 1 or inputs != outputs
            if changes:
                layers[f"{name}.{shortcut}.0"] = conv(inputs, outputs, 1, step)
                layers[f"{name}.{shortcut}.1"] = norm(outputs)
            plan.append((name, len(shapes), changes))
            inputs = outputs
    layers[head] = linear(inputs, classes)
    f = activation(act)

    def forward(get: Get, x: Any) -> Any:
        x = f(get("bn1")(get("conv1")(x)))
        if not small:
            pool = pytest.importorskip("torch").nn.functional.max_pool2d
            x = pool(x, 3, 2, 1)
        for name, number, changes in plan:
            y = x
            for place in range(1, number + 1):
                y = f(y) if place > 1 else y
                y = get(f"{name}.bn{place}")(get(f"{name}.conv{place}")(y))
            if changes:
                x = get(f"{name}.{shortcut}.1")(get(f"{name}.{shortcut}.0")(x))
            x = f(x + y)
        return get(head)(x.mean((2, 3)))

    return assembled(layers, forward)


def preact(
    stages: tuple[int, ...],
    act: str,
    final_norm: bool = True,
    raw: bool = False,
    classes: int = 10,
) -> Any:
    """PreActResNet; shortcuts with a convolution see the activated or the raw input."""
    layers: Layers = {"conv1": conv(3, 64, 3)}
    plan = []
    inputs = 64
    for stage, number in enumerate(stages):
        width = 64 * 2**stage
        for index in range(number):
            stride = 2 if stage and not index else 1
            name = f"layer{stage + 1}.{index}"
            layers[f"{name}.bn1"] = norm(inputs)
            layers[f"{name}.conv1"] = conv(inputs, width, 3, stride)
            layers[f"{name}.bn2"] = norm(width)
            layers[f"{name}.conv2"] = conv(width, width, 3)
            changes = stride != 1 or inputs != width
            if changes:
                layers[f"{name}.shortcut.0"] = conv(inputs, width, 1, stride)
            plan.append((name, changes))
            inputs = width
    if final_norm:
        layers["bn"] = norm(inputs)
    layers["linear"] = linear(inputs, classes)
    f = activation(act)

    def forward(get: Get, x: Any) -> Any:
        x = get("conv1")(x)
        for name, changes in plan:
            inner = f(get(f"{name}.bn1")(x))
            y = get(f"{name}.conv2")(f(get(f"{name}.bn2")(get(f"{name}.conv1")(inner))))
            x = y + (get(f"{name}.shortcut.0")(x if raw else inner) if changes else x)
        x = f(get("bn")(x)) if final_norm else x
        return get("linear")(x.mean((2, 3)))

    return assembled(layers, forward)


def deepmind_preact(stages: tuple[int, ...], act: str, classes: int = 10) -> Any:
    """DeepMind's PreActResNet: 3x3 shortcuts of the raw input."""
    layers: Layers = {"conv_2d": conv(3, 64, 3)}
    plan = []
    inputs = 64
    for stage, number in enumerate(stages):
        width = 64 * 2**stage
        for index in range(number):
            stride = 2 if stage and not index else 1
            name = f"layer_{stage}.{index}"
            layers[f"{name}.batchnorm_0"] = norm(inputs)
            layers[f"{name}.conv_2d_1"] = conv(inputs, width, 3, stride, padding=0)
            layers[f"{name}.batchnorm_1"] = norm(width)
            layers[f"{name}.conv_2d_2"] = conv(width, width, 3)
            changes = stride != 1 or inputs != width
            if changes:
                layers[f"{name}.shortcut"] = conv(inputs, width, 3, stride, padding=0)
            plan.append((name, stride, changes))
            inputs = width
    layers |= {"batchnorm": norm(inputs), "logits": linear(inputs, classes)}
    f = activation(act)

    def forward(get: Get, x: Any) -> Any:
        x = get("conv_2d")(x)
        for name, stride, changes in plan:
            y = f(get(f"{name}.batchnorm_0")(x))
            y = get(f"{name}.conv_2d_1")(corner(y, stride))
            y = get(f"{name}.conv_2d_2")(f(get(f"{name}.batchnorm_1")(y)))
            x = y + (get(f"{name}.shortcut")(corner(x, stride)) if changes else x)
        return get("logits")(f(get("batchnorm")(x)).mean((2, 3)))

    return assembled(layers, forward)


def wide(
    blocks: tuple[int, ...],
    widths: tuple[int, ...],
    act: str,
    shortcut: str = "convShortcut",
    last: str = "bn1",
    stem: str = "conv1",
    place: str = "block{1}.layer.{2}",
    cosine: bool = False,
    classes: int = 10,
) -> Any:
    """WideResNet with groups of any depths and widths.

    Its names are the usual ones, or others; its activation may be "pssilu", and its
    logits cosines. A block's place has the group's number from 0 and from 1.
    """
    layers: Layers = {stem: conv(3, widths[0], 3)}
    if act == "pssilu":
        layers["activation"] = pssilu()
    plan = []
    inputs = widths[0]
    for group, (number, width) in enumerate(zip(blocks, widths[1:], strict=True)):
        for index in range(number):
            stride = 2 if group and not index else 1
            name = place.format(group, group + 1, index)
            if act == "pssilu":
                layers[f"{name}.activation"] = layers["activation"]
            layers[f"{name}.bn1"] = norm(inputs)
            layers[f"{name}.conv1"] = conv(inputs, width, 3, stride)
            layers[f"{name}.bn2"] = norm(width)
            layers[f"{name}.conv2"] = conv(width, width, 3)
            if inputs != width:
                layers[f"{name}.{shortcut}"] = conv(inputs, width, 1, stride)
            plan.append((name, inputs != width))
            inputs = width
    layers |= {last: norm(inputs), "fc": linear(inputs, classes, not cosine)}
    unit = pytest.importorskip("torch").nn.functional.normalize

    def forward(get: Get, x: Any) -> Any:
        f = get("activation") if act == "pssilu" else activation(act)
        x = get(stem)(x)
        for name, widens in plan:
            inner = f(get(f"{name}.bn1")(x))
            y = get(f"{name}.conv2")(f(get(f"{name}.bn2")(get(f"{name}.conv1")(inner))))
            x = y + (get(f"{name}.{shortcut}")(inner) if widens else x)
        x = f(get(last)(x)).mean((2, 3))
        return unit(x) @ unit(get("fc").weight).T if cosine else get("fc")(x)

    return assembled(layers, forward)


def ra_imagenet(
    blocks: tuple[int, ...], widths: tuple[int, ...], classes: int = 10
) -> Any:
    """RaWRN for ImageNet."""
    stem = "stem.stem.stem"
    layers: Layers = {f"{stem}.0": conv(3, widths[0], 7, 2)}
    layers[f"{stem}.1"] = norm(widths[0])
    plan = []
    inputs = widths[0]
    for stage, (number, width) in enumerate(zip(blocks, widths[1:], strict=True)):
        for index in range(number):
            stride, inner = 1 if index else 2, width // 4
            gates = round(inputs / 4)
            name = f"stages.stage{stage + 1}.stage{stage + 1}-block{index}"
            layers[f"{name}.F.a.0"] = conv(inputs, inner, 1)
            layers[f"{name}.F.b.0"] = conv(inner, inner, 3, stride, groups=2)
            layers[f"{name}.F.b.1"] = norm(inner)
            layers[f"{name}.F.se.fc1"] = conv(inner, gates, 1, bias=True)
            layers[f"{name}.F.se.fc2"] = conv(gates, inner, 1, bias=True)
            layers[f"{name}.F.c.0"] = conv(inner, width, 1)
            layers[f"{name}.F.c.1"] = norm(width)
            if not index:
                layers[f"{name}.proj.0"] = conv(inputs, width, 1, stride)
                layers[f"{name}.proj.1"] = norm(width)
            plan.append((name, not index))
            inputs = width
    layers["fc"] = linear(inputs, classes)
    f, relu = activation("swish"), activation("relu")

    def forward(get: Get, x: Any) -> Any:
        x = relu(get(f"{stem}.1")(get(f"{stem}.0")(x)))
        for name, first in plan:
            y = f(get(f"{name}.F.a.0")(x))
            y = f(get(f"{name}.F.b.1")(get(f"{name}.F.b.0")(y)))
            gate = relu(get(f"{name}.F.se.fc1")(y.mean((2, 3), True)))
            y = y * get(f"{name}.F.se.fc2")(gate).sigmoid()
            y = get(f"{name}.F.c.1")(get(f"{name}.F.c.0")(y))
            x = get(f"{name}.proj.1")(get(f"{name}.proj.0")(x)) if first else x
            x = f(x + y)
        return get("fc")(x.mean((2, 3)))

    return assembled(layers, forward)
