"""The digits with a network of two convolutions, which compiles fast.

For tests where the network is not the point: `import small` makes it known, and a
command takes it as --config=tests/small.py.
"""

from pathlib import Path

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from atebm_jax import models
from atebm_jax.command_line import load_config
from atebm_jax.models import family
from atebm_jax.models.layers import ACTIVATIONS, Conv, batch_norm

DIGITS = Path(__file__).parents[1] / "configs" / "digits.py"


class Small(family.Network):
    """Two convolutions with batch normalisation; 8 k and 16 k channels."""

    widen_factor: int
    activation: str = "relu"

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, features: bool = False
    ) -> jax.Array:
        activation = ACTIVATIONS[self.activation]
        x = self.normalised(images)
        for index in (0, 1):
            channels = 8 * self.widen_factor * 2**index
            name = f"conv{index}"
            x = Conv(channels, 3, 1 + index, 1, dtype=self.dtype, name=name)(x)
            x = activation(batch_norm(f"bn{index}", train)(x))
        x = x.mean(axis=(1, 2))
        return x if features else nn.Dense(self.num_classes, name="fc")(x)


def build(config: ConfigDict) -> Small:
    return Small(**family.network_fields(config, "widen_factor", "activation"))


# The first one stays where this file is run as a config beside its import.
models.FAMILIES.setdefault(
    "small", family.Family(build=build, sized_by=("widen_factor",))
)


def get_config() -> ConfigDict:
    config = load_config(str(DIGITS))
    config.model.name = "small"
    return config
