"""Networks in PyTorch with random weights everywhere, to compare ours with."""

import functools
from typing import Any

import numpy as np
import pytest


@functools.cache
def torch_and_timm() -> tuple[Any, Any]:
    """PyTorch and timm; skips where they are not installed."""
    torch = pytest.importorskip("torch")
    # A torchvision without its compiled part, which a CPU build of PyTorch cannot load,
    # is enough for timm once these names exist.
    try:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                arguments = "(Tensor dets, Tensor scores, float iou_threshold)"
                library.define(f"{name}{arguments} -> Tensor")
        torch_and_timm.library = library
    except RuntimeError:
        pass
    return torch, pytest.importorskip("timm")


def create(name: str, **options: Any) -> Any:
    """A timm network in evaluation mode; "_cvst" puts a ConvStem in front."""
    torch, timm = torch_and_timm()
    torch.manual_seed(0)
    network = timm.create_model(name.removesuffix("_cvst"), **options)
    if name.endswith("_cvst"):
        _add_conv_stem(network, name)
    randomise(network)
    return network.eval()


def randomise(network: Any) -> None:
    """Weights that keep activations alive, and nothing at 0 or 1."""
    torch, _ = torch_and_timm()
    positive = ("running_var", "weight")
    with torch.no_grad():
        for name, value in [*network.named_parameters(), *network.named_buffers()]:
            if not value.is_floating_point():
                continue
            noise = torch.randn_like(value)
            if value.ndim == 1 and name.endswith("gamma"):
                value.copy_(0.1 + 0.01 * noise)
            elif value.ndim == 1:
                noise = 0.1 * noise
                value.copy_(1 + noise.abs() if name.endswith(positive) else noise)
            elif name.endswith("weight"):
                value.copy_(noise / value[0].numel() ** 0.5)
            else:
                value.copy_(0.1 * noise)


def _add_conv_stem(network: Any, name: str) -> None:
    torch, timm = torch_and_timm()
    nn = torch.nn

    def layers(widths: list[int], strides: list[int]) -> list[Any]:
        made: list[Any] = []
        for inputs, outputs, stride in zip([3, *widths], widths, strides, strict=False):
            made.append(nn.Conv2d(inputs, outputs, 3, stride, 1))
            made.append(timm.layers.LayerNorm2d(outputs, eps=1e-6))
            made.append(nn.GELU())
        return made

    stem = nn.Module()
    if name.startswith("vit"):
        width = network.embed_dim
        stack = layers([48, 96, 192, 384], [2, 2, 2, 2]) + [nn.Conv2d(384, width, 1)]
        network.patch_embed.proj = stem
    else:
        stack = layers([64, 96, 128], [2, 2, 1])
        if "base" not in name:
            stack = layers([48, 96], [2, 2])
        network.stem = stem
    stem.stem = nn.Sequential(*stack)
    stem.forward = stem.stem.forward


def state_dict(network: Any) -> dict[str, np.ndarray]:
    """Its parameters and buffers as arrays."""
    return {name: value.numpy() for name, value in network.state_dict().items()}


def logits_and_gradient(
    network: Any, images: np.ndarray, label: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of images [B, H, W, C], and the image gradient of one class's logit."""
    torch, _ = torch_and_timm()
    pixels = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
    logits = network(pixels)
    logits[:, label].sum().backward()
    gradient = pixels.grad.numpy().transpose(0, 2, 3, 1)
    return logits.detach().numpy(), gradient
