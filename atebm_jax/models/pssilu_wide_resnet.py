"""WideResNet with a learned activation, PSSiLU (Dai et al., 2021).

x (sigmoid(|a| x) - |b|) / (1 - |b|), with the same a and b everywhere in the network:
SiLU at a = 1 and b = 0.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from atebm_jax.models import family, wide_resnet
from atebm_jax.models.layers import at_least_float32


class PSSiLU(nn.Module):
    """An array of any shape to one of the same shape and dtype."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = at_least_float32(x)

        def size(name: str, value: float) -> jax.Array:
            init = nn.initializers.constant(value)
            made = self.param(name, init, (1,), jnp.float32)
            return jnp.abs(made[0]).astype(wide.dtype)

        slope, sunk = size("alpha", 1.0), size("beta", 1e-8)
        return (wide * (nn.sigmoid(slope * wide) - sunk) / (1 - sunk)).astype(x.dtype)


class PSSiLUWideResNet(wide_resnet.PreActivated):
    """Images [B, H, W, C] float in [0, 1] to logits [B, num_classes] float32."""

    def active(self) -> Callable[[jax.Array], jax.Array]:
        return PSSiLU(name="activation")


def build(config: ml_collections.ConfigDict) -> wide_resnet.PreActivated:
    """Builds a WideResNet with PSSiLU from `config.model`.

    Raises:
      UserError: depth not 6n + 4, or no width.
    """
    wide_resnet.check_size(config.depth, config.widen_factor)
    size = (config.depth, config.widen_factor)
    fields = family.network_fields(config)
    return wide_resnet.network(*size, kind=PSSiLUWideResNet, **fields)


_COPY = re.compile(r"block\d+\.layer\.\d+\.(activation\.(?:alpha|beta))")


def _settle(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the copies of the one activation that PyTorch writes for each block."""

    def is_copy(name: str) -> bool:
        match = _COPY.fullmatch(name)
        if match is None:
            return False
        return np.array_equal(arrays[name], arrays.get(match[1], ()))

    return {name: array for name, array in arrays.items() if not is_copy(name)}


def _beside(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The copies again, and what batch normalisation counts."""
    blocks = {".".join(name.split(".")[:3]) for name in arrays if ".layer." in name}
    copies = {
        f"{block}.{name}": arrays[name].copy()
        for block in blocks
        for name in ("activation.alpha", "activation.beta")
    }
    return copies | family.batch_counters(arrays)


FAMILY = family.Family(
    build=build,
    sized_by=("depth", "widen_factor"),
    fields=wide_resnet.FAMILY.fields,
    archs={"pssilu_wrn28_10": wide_resnet.arch(28, 10, family.AS_THEY_ARE)},
    activation="pssilu",
    torch=dataclasses.replace(
        wide_resnet.NAMES,
        rules=(("activation", "activation"), *wide_resnet.NAMES.rules),
        mark="activation.alpha",
        usual=lambda model: family.AS_THEY_ARE,
        who="",
        bare={"alpha": 1, "beta": 1},
        settle=_settle,
        beside=_beside,
        look_alikes={},
        published="Dai2021 (Parameterizing activation functions)",
    ),
)
