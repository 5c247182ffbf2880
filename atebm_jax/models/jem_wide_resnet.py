"""JEM's WideResNet (Grathwohl et al., 2020): biases and LeakyReLU 0.2, no norm.

It sees images in [-1, 1]. The stride of a block is in its second convolution.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import ml_collections

from atebm_jax.models import family, wide_resnet
from atebm_jax.models.layers import Conv, Dense, at_least_float32

_leaky_relu = partial(nn.leaky_relu, negative_slope=0.2)

_NORMALIZATION = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


class Block(nn.Module):
    """Two 3x3 convolutions after the activation, with a shortcut.

    Attributes:
      features: output channels.
      stride: of the second convolution and of the shortcut.
    """

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(Conv, self.features, use_bias=True, dtype=self.dtype)
        y = conv(3, 1, 1, name="conv1")(_leaky_relu(x))
        y = conv(3, self.stride, 1, name="conv2")(_leaky_relu(y))
        if self.stride == 1 and x.shape[-1] == self.features:
            return x + y
        return y + conv(1, self.stride, name="shortcut")(x)


class JEMWideResNet(family.Network):
    """Images [B, H, W, C] float in [0, 1] to logits [B, num_classes] float32.

    Attributes:
      depth: 6n + 4.
      widen_factor: width k; the groups have 16k, 32k and 64k channels.
    """

    depth: int
    widen_factor: int

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, features: bool = False
    ) -> jax.Array:
        """Logits, or the pooled features [B, 64 k] before them."""
        block = nn.remat(Block) if self.remat else Block
        x = self.normalised(images)
        x = Conv(16, 3, 1, 1, use_bias=True, dtype=self.dtype, name="conv1")(x)
        for group in range(3):
            for index in range((self.depth - 4) // 6):
                x = block(
                    features=16 * self.widen_factor * 2**group,
                    stride=2 if group > 0 and index == 0 else 1,
                    dtype=self.dtype,
                    name=f"block{group + 1}_{index}",
                )(x)
        x = _leaky_relu(at_least_float32(x)).mean(axis=(1, 2))
        return x if features else Dense(self.num_classes, name="fc")(x)


def build(config: ml_collections.ConfigDict) -> JEMWideResNet:
    """Builds JEM's WideResNet from `config.model`.

    Raises:
      UserError: depth not 6n + 4, or no width.
    """
    wide_resnet.check_size(config.depth, config.widen_factor)
    return JEMWideResNet(**family.network_fields(config, "depth", "widen_factor"))


FAMILY = family.Family(
    build=build,
    sized_by=("depth", "widen_factor"),
    fields=wide_resnet.FAMILY.fields,
    activation="leaky_relu",
    archs={"jem_wrn28_10": wide_resnet.arch(28, 10, _NORMALIZATION)},
    # The names of `Wide_ResNet` in the authors' code; the classifier around it has
    # them under "f", and its last layer beside.
    torch=family.TorchNames(
        rules=(
            ("conv1", "conv1"),
            ("layer{g}.{b}.conv{k}", "block{g}_{b}/conv{k}"),
            ("layer{g}.{b}.shortcut.0", "block{g}_{b}/shortcut"),
            ("linear", "fc"),
        ),
        published="JEM (Grathwohl et al., 2020)",
        mark="layer1.0.conv1.bias",
        first=("conv1.weight",),
        fields=partial(wide_resnet.fields, block="layer1.{}.conv1.weight"),
        side=lambda model: 32,
        usual=lambda model: _NORMALIZATION,
        aliases=(("fc.{leaf}", "linear.{leaf}"),),
    ),
)
