"""Inception-v3 (Szegedy et al., 2016) as the Frechet Inception distance uses it.

The TensorFlow network of 2015 with 1,008 outputs differs from torchvision's: its
averages leave the padding out, and the pooling branch of its last block takes maxima.
Layers have the names of the PyTorch port, so that weights are found by name. Evaluation
mode only.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from atebm_jax.models import bilinear
from atebm_jax.models.bilinear import PRECISION

SIZE = 299
NUM_LOGITS = 1008


class Conv(NamedTuple):
    """Convolution without bias, normalisation, ReLU."""

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


class Fork(NamedTuple):
    """Convolutions of one input side by side."""

    ways: tuple[Conv, ...]


# Layers in sequence; "average", "max" and "halve" (max, stride 2) are 3x3 poolings.
Chain = tuple[Conv | Fork | str, ...]


def _block_a(pooled: int) -> tuple[Chain, ...]:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3)),
        ),
        ("average", Conv("branch_pool", pooled)),
    )


def _block_c(width: int) -> tuple[Chain, ...]:
    return (
        (Conv("branch1x1", 192),),
        (
            Conv("branch7x7_1", width),
            Conv("branch7x7_2", width, (1, 7)),
            Conv("branch7x7_3", 192, (7, 1)),
        ),
        (
            Conv("branch7x7dbl_1", width),
            Conv("branch7x7dbl_2", width, (7, 1)),
            Conv("branch7x7dbl_3", width, (1, 7)),
            Conv("branch7x7dbl_4", width, (7, 1)),
            Conv("branch7x7dbl_5", 192, (1, 7)),
        ),
        ("average", Conv("branch_pool", 192)),
    )


def _block_e(pooling: str) -> tuple[Chain, ...]:
    def cross(name: str) -> Fork:
        return Fork((Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1))))

    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), cross("branch3x3_2")),
        (
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, (3, 3)),
            cross("branch3x3dbl_3"),
        ),
        (pooling, Conv("branch_pool", 192)),
    )


_BLOCK_B: tuple[Chain, ...] = (
    (Conv("branch3x3", 384, (3, 3), 2, "VALID"),),
    (
        Conv("branch3x3dbl_1", 64),
        Conv("branch3x3dbl_2", 96, (3, 3)),
        Conv("branch3x3dbl_3", 96, (3, 3), 2, "VALID"),
    ),
    ("halve",),
)

_BLOCK_D: tuple[Chain, ...] = (
    (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2, "VALID")),
    (
        Conv("branch7x7x3_1", 192),
        Conv("branch7x7x3_2", 192, (1, 7)),
        Conv("branch7x7x3_3", 192, (7, 1)),
        Conv("branch7x7x3_4", 192, (3, 3), 2, "VALID"),
    ),
    ("halve",),
)

_BLOCKS: dict[str, tuple[Chain, ...]] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _BLOCK_B,
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _BLOCK_D,
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("max"),
}

_STEM: Chain = (
    Conv("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
    Conv("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    "halve",
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
    "halve",
)


class Outputs(NamedTuple):
    """What the scores are computed from.

    Attributes:
      features: [B, 2048] float32, "pool3".
      logits: [B, 1008] float32.
      unbiased_logits: [B, 1008] float32, without the last layer's bias: the reference
        protocol's Inception Score uses these.
    """

    features: jax.Array
    logits: jax.Array
    unbiased_logits: jax.Array


class InceptionV3(nn.Module):
    """Images [B, 299, 299, 3] float32 in [-1, 1] to `Outputs`; see `resized`."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> Outputs:
        x = _run(_STEM, inputs)
        for name, branches in _BLOCKS.items():
            x = _Mixed(branches, name=name)(x)
        features = x.mean(axis=(1, 2))
        last = nn.Dense(NUM_LOGITS, use_bias=False, precision=PRECISION, name="fc")
        unbiased = last(features)
        bias = self.param("fc_bias", nn.initializers.zeros, (NUM_LOGITS,))
        return Outputs(features, unbiased + bias[None, :], unbiased)


class _Mixed(nn.Module):
    branches: tuple[Chain, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([_run(chain, x) for chain in self.branches], axis=-1)


class _ConvNorm(nn.Module):
    layer: Conv

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, features, kernel, stride, padding = self.layer
        x = nn.Conv(
            features,
            kernel,
            (stride, stride),
            padding,
            use_bias=False,
            precision=PRECISION,
            name="conv",
        )(x)
        return nn.relu(nn.BatchNorm(True, epsilon=1e-3, name="bn")(x))


def _run(chain: Chain, x: jax.Array) -> jax.Array:
    """Applies a chain inside the compact method of the module that owns its layers."""
    for layer in chain:
        if isinstance(layer, Conv):
            x = _ConvNorm(layer, name=layer.name)(x)
        elif isinstance(layer, Fork):
            ways = [_ConvNorm(way, name=way.name)(x) for way in layer.ways]
            x = jnp.concatenate(ways, axis=-1)
        elif layer == "halve":
            x = nn.max_pool(x, (3, 3), (2, 2), "VALID")
        elif layer == "max":
            x = nn.max_pool(x, (3, 3), (1, 1), "SAME")
        else:
            x = nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
    return x


def resized(images: jax.Array) -> jax.Array:
    """Images to the network's input, as the Frechet Inception distance does it.

    Bilinear as of `bilinear.resized`, then 2 x - 1.

    Args:
      images: [B, H, W, 3] float32 in [0, 1], of any size.

    Returns:
      [B, 299, 299, 3] float32 in [-1, 1].
    """
    return 2.0 * bilinear.resized(images, SIZE) - 1.0


_LEAVES = {
    ("conv", "kernel"): "conv.weight",
    ("bn", "scale"): "bn.weight",
    ("bn", "bias"): "bn.bias",
    ("bn", "mean"): "bn.running_mean",
    ("bn", "var"): "bn.running_var",
}


def torch_name(keys: list[str]) -> str:
    """The PyTorch port's name of our parameter at a path."""
    if keys[0].startswith("fc"):
        return "fc.bias" if keys == ["fc_bias"] else "fc.weight"
    return ".".join([*keys[:-2], _LEAVES[keys[-2], keys[-1]]])
