"""ResNet and ConvNeXt in plain PyTorch, the twins of ours for `step.py`.

Written as one would write them in PyTorch, under the usual names of their parameters,
so that `convert` reads them. Images are NCHW here. ConvNeXts normalise over channels
through a transposed view: in `channels_last` that copies nothing.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}

# Blocks and channels of each stage; (channels, stride) of the convolutions in front.
SIZES = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}
CONV_STEMS = {
    "tiny": ((48, 2), (96, 2)),
    "small": ((48, 2), (96, 2)),
    "base": ((64, 2), (96, 2), (128, 1)),
    "large": ((96, 2), (144, 2), (192, 1)),
}


class Normalized(nn.Module):
    """(x - mean) / std per channel, where there are any, as part of a network."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        shape = (1, -1, 1, 1)
        # Buffers outside the state dict: they are constants of the data set.
        self.register_buffer("mean", torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(shape), persistent=False)
        self.normalizes = bool(mean)

    def normalize(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std if self.normalizes else x


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1, and a shortcut."""

    def __init__(self, inputs: int, inner: int, features: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, features, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(features)
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(inputs, features, 1, stride, bias=False),
                nn.BatchNorm2d(features),
            )
            if stride > 1 or inputs != features
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = functional.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return functional.relu(y + self.downsample(x), inplace=True)


class ResNet(Normalized):
    """Images [B, C, H, W] in [0, 1] to logits [B, K]; depth 50 or 101."""

    def __init__(
        self,
        *,
        depth: int,
        base_width: int,
        num_classes: int,
        channels: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        super().__init__(mean, std)
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for stage, count in enumerate(STAGES[depth]):
            planes = 64 * 2**stage
            blocks = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                inner = planes * base_width // 64
                blocks.append(Bottleneck(inputs, inner, 4 * planes, stride))
                inputs = 4 * planes
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, Bottleneck):
                # Branches of a trained network's size: of full size, they blow
                # rounding up from block to block.
                nn.init.constant_(module.bn3.weight, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(self.normalize(x))), inplace=True)
        x = functional.max_pool2d(x, 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(dim=(2, 3)))


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation of [B, C, H, W] over the channels."""

    def __init__(self, features: int):
        super().__init__(features, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.fc1 = nn.Linear(features, 4 * features)
        self.fc2 = nn.Linear(4 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, norm, two dense layers with GELU between, scaled and added."""

    def __init__(self, features: int):
        super().__init__()
        self.conv_dw = nn.Conv2d(features, features, 7, padding=3, groups=features)
        self.norm = nn.LayerNorm(features, eps=1e-6)
        self.mlp = Mlp(features)
        # As large as in a trained network, so that the branches count.
        self.gamma = nn.Parameter(0.1 * torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_dw(x).permute(0, 2, 3, 1)
        y = self.mlp(self.norm(y)) * self.gamma
        return x + y.permute(0, 3, 1, 2)


class Stage(nn.Module):
    def __init__(self, inputs: int, features: int, count: int):
        super().__init__()
        self.downsample = (
            nn.Sequential(ChannelNorm(inputs), nn.Conv2d(inputs, features, 2, 2))
            if inputs != features
            else nn.Identity()
        )
        self.blocks = nn.Sequential(*(ConvNeXtBlock(features) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class ConvStem(nn.Module):
    """3x3 convolutions, each with norm and GELU."""

    def __init__(self, channels: int, layers: tuple[tuple[int, int], ...]):
        super().__init__()
        made: list[nn.Module] = []
        for features, stride in layers:
            made.append(nn.Conv2d(channels, features, 3, stride, 1))
            made += [ChannelNorm(features), nn.GELU()]
            channels = features
        self.stem = nn.Sequential(*made)

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)


class Head(nn.Module):
    def __init__(self, features: int, num_classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(features, eps=1e-6)
        self.fc = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x.mean(dim=(2, 3))))


class ConvNeXt(Normalized):
    """Images [B, C, H, W] in [0, 1] to logits [B, K], patches or a ConvStem."""

    def __init__(
        self,
        *,
        size: str,
        stem: str,
        num_classes: int,
        channels: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        super().__init__(mean, std)
        counts, widths = SIZES[size]
        self.stem: nn.Module = (
            ConvStem(channels, CONV_STEMS[size])
            if stem == "conv"
            else nn.Sequential(
                nn.Conv2d(channels, widths[0], 4, 4), ChannelNorm(widths[0])
            )
        )
        self.stages = nn.Sequential(
            *(
                Stage(widths[max(index - 1, 0)], widths[index], count)
                for index, count in enumerate(counts)
            )
        )
        self.head = Head(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(self.normalize(x))))
