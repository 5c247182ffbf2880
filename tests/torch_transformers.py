"""XCiT and Swin in PyTorch by their definitions: functions of arrays by timm's names.

Images are [B, C, H, W] and already normalised, arrays are tensors. What the published
code reaches by rolling and cutting windows is written here as attention over the whole
grid, with a rule for each pair of patches.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

Arrays = dict[str, torch.Tensor]


def _linear(arrays: Arrays, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, arrays[f"{name}.weight"], arrays.get(f"{name}.bias"))


def _conv(arrays: Arrays, name: str, x: torch.Tensor, **how: Any) -> torch.Tensor:
    return F.conv2d(x, arrays[f"{name}.weight"], arrays.get(f"{name}.bias"), **how)


def _batch_norm(arrays: Arrays, name: str, x: torch.Tensor) -> torch.Tensor:
    mean, var, scale, shift = (
        arrays[f"{name}.{part}"][:, None, None]
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * scale + shift


def _layer_norm(
    arrays: Arrays, name: str, x: torch.Tensor, epsilon: float = 1e-6
) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon)
    return x * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]


def _mlp(arrays: Arrays, name: str, x: torch.Tensor) -> torch.Tensor:
    y = _sparse(arrays, f"{name}.meansparse1", _linear(arrays, f"{name}.fc1", x))
    y = _linear(arrays, f"{name}.fc2", F.gelu(y))
    return _sparse(arrays, f"{name}.meansparse2", y)


def _sparse(arrays: Arrays, name: str, x: torch.Tensor) -> torch.Tensor:
    """Values close to their channel's mean become the mean, where arrays say how."""
    if f"{name}.threshold" not in arrays:
        return x
    mean, var, threshold = (
        arrays[f"{name}.{part}"]
        for part in ("running_mean", "running_var", "threshold")
    )
    return torch.where((x - mean).abs() < threshold * var.sqrt(), mean, x)


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, N, C] -> [B, heads, N, C / heads]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def position_code(height: int, width: int) -> torch.Tensor:
    """[height, width, 64], one number after the other."""
    code = torch.zeros(height, width, 64, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            places = ((row + 1, height), (column + 1, width))
            for half, (place, side) in enumerate(places):
                for index in range(32):
                    slowness = 10_000 ** (2 * (index // 2) / 32)
                    angle = 2 * math.pi * place / (side + 1e-6) / slowness
                    wave = math.cos if index % 2 else math.sin
                    code[row, column, 32 * half + index] = wave(angle)
    return code


def xcit(
    arrays: Arrays, images: torch.Tensor, heads: int, strides: tuple[int, ...]
) -> torch.Tensor:
    """Logits [B, K] of an XCiT of any depth."""
    x = images
    for index, stride in enumerate(strides):
        name = f"patch_embed.proj.{2 * index}"
        x = F.gelu(x) if index else x
        x = _conv(arrays, f"{name}.0", x, stride=stride, padding=1)
        x = _batch_norm(arrays, f"{name}.1", x)
    batch, channels, height, width = x.shape
    code = position_code(height, width).to(x).permute(2, 0, 1)[None]
    x = x + _conv(arrays, "pos_embed.token_projection", code)
    x = x.flatten(2).transpose(1, 2)
    block = 0
    while f"blocks.{block}.gamma1" in arrays:
        name = f"blocks.{block}"
        gammas = [arrays[f"{name}.gamma{k}"] for k in (1, 2, 3)]
        y = _layer_norm(arrays, f"{name}.norm1", x)
        x = x + gammas[0] * _cross_covariance(arrays, f"{name}.attn", y, heads)
        y = _layer_norm(arrays, f"{name}.norm3", x)
        y = y.transpose(1, 2).reshape(batch, channels, height, width)
        how = {"padding": 1, "groups": channels}
        y = F.gelu(_conv(arrays, f"{name}.local_mp.conv1", y, **how))
        y = _batch_norm(arrays, f"{name}.local_mp.bn", y)
        y = _conv(arrays, f"{name}.local_mp.conv2", y, **how)
        x = x + gammas[2] * y.flatten(2).transpose(1, 2)
        y = _layer_norm(arrays, f"{name}.norm2", x)
        x = x + gammas[1] * _mlp(arrays, f"{name}.mlp", y)
        block += 1
    x = torch.cat([arrays["cls_token"].expand(batch, 1, -1), x], 1)
    for block in range(2):
        x = _class_block(arrays, f"cls_attn_blocks.{block}", x, heads)
    return _linear(arrays, "head", _layer_norm(arrays, "norm", x)[:, 0])


def _cross_covariance(
    arrays: Arrays, name: str, x: torch.Tensor, heads: int
) -> torch.Tensor:
    """Equation 4 of the XCiT paper: V softmax(K'Q / tau), as the code transposes it."""
    query, key, value = _linear(arrays, f"{name}.qkv", x).chunk(3, -1)
    query, key, value = (_heads(y, heads) for y in (query, key, value))
    query = query / query.norm(dim=2, keepdim=True)
    key = key / key.norm(dim=2, keepdim=True)
    weights = torch.einsum("bhnd,bhne->bhde", query, key)
    weights = (weights * arrays[f"{name}.temperature"]).softmax(-1)
    y = torch.einsum("bhde,bhne->bnhd", weights, value)
    return _linear(arrays, f"{name}.proj", y.flatten(2))


def _class_block(
    arrays: Arrays, name: str, x: torch.Tensor, heads: int
) -> torch.Tensor:
    y = _layer_norm(arrays, f"{name}.norm1", x)
    query = _heads(_linear(arrays, f"{name}.attn.q", y[:, :1]), heads)
    key = _heads(_linear(arrays, f"{name}.attn.k", y), heads)
    value = _heads(_linear(arrays, f"{name}.attn.v", y), heads)
    weights = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    token = (weights.softmax(-1) @ value).transpose(1, 2).flatten(2)
    y = torch.cat([_linear(arrays, f"{name}.attn.proj", token), y[:, 1:]], 1)
    x = x + arrays[f"{name}.gamma1"] * y
    x = _layer_norm(arrays, f"{name}.norm2", x)
    y = arrays[f"{name}.gamma2"] * _mlp(arrays, f"{name}.mlp", x[:, :1])
    return x + torch.cat([y, x[:, 1:]], 1)


def swin(
    arrays: Arrays,
    images: torch.Tensor,
    heads: int,
    sides: tuple[int, ...],
    epsilon: float = 1e-5,
) -> torch.Tensor:
    """Logits [B, K] of a Swin, or a sparse one, by the sides of its stages' windows."""
    x = _conv(arrays, "patch_embed.proj", images, stride=4).permute(0, 2, 3, 1)
    x = _layer_norm(arrays, "patch_embed.norm", x, epsilon)
    for stage, side in enumerate(sides):
        if stage:
            name = f"layers.{stage}.downsample"
            corners = ((0, 0), (1, 0), (0, 1), (1, 1))
            x = torch.cat([x[:, i::2, j::2] for i, j in corners], -1)
            x = _layer_norm(arrays, f"{name}.norm", x, epsilon)
            x = _linear(arrays, f"{name}.reduction", x)
        block = 0
        while f"layers.{stage}.blocks.{block}.norm1.weight" in arrays:
            name = f"layers.{stage}.blocks.{block}"
            y = _layer_norm(arrays, f"{name}.norm1", x, epsilon)
            shifted, count = block % 2 == 1, heads * 2**stage
            x = x + _in_windows(arrays, f"{name}.attn", y, count, side, shifted)
            x = _sparse(arrays, f"{name}.meansparse1", x)
            y = _layer_norm(arrays, f"{name}.norm2", x, epsilon)
            x = x + _mlp(arrays, f"{name}.mlp", y)
            x = _sparse(arrays, f"{name}.meansparse2", x)
            block += 1
    x = _layer_norm(arrays, "norm", x, epsilon).mean((1, 2))
    return _linear(arrays, "head.fc", x)


def _in_windows(
    arrays: Arrays, name: str, x: torch.Tensor, heads: int, side: int, shifted: bool
) -> torch.Tensor:
    """Attention of all patches to those in their window and on their side of the edge.

    The windows begin half a side further in where they are shifted, and the last ones
    take what is before the first from the other end of the grid, unseen by the rest.
    """
    height, width = x.shape[1:3]
    offset = torch.full((height * width,) * 2, 0)
    together = torch.ones_like(offset, dtype=torch.bool)
    places = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for place, length in zip(places, (height, width), strict=True):
        start = side // 2 if shifted and length > side else 0
        moved = ((place - start) % length).flatten()
        for part in (moved // side, moved >= length - start):
            together &= part[:, None] == part[None]
        offset = offset * (2 * side - 1) + moved[:, None] - moved[None] + side - 1
    table = arrays[f"{name}.relative_position_bias_table"]
    bias = table[torch.where(together, offset, 0)].permute(2, 0, 1)
    bias = bias.masked_fill(~together, -math.inf)
    query, key, value = _linear(arrays, f"{name}.qkv", x.flatten(1, 2)).chunk(3, -1)
    query, key, value = (_heads(y, heads) for y in (query, key, value))
    weights = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1]) + bias
    y = (weights.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return _linear(arrays, f"{name}.proj", y).reshape(x.shape)
