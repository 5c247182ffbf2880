"""WideResNet with cosines as logits (Pang et al., 2020, Boosting adversarial training).

Features and each class's weights have length 1, and there is no bias. Its authors
multiply the logits by 15 in the losses, not in the network.
"""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from atebm_jax.models import family, wide_resnet
from atebm_jax.models.layers import prepared, unit


class Cosines(nn.Module):
    """[B, D] to the cosines of the angles to `features` learned vectors, in [-1, 1]."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        init = nn.initializers.lecun_normal()
        kernel = lambda: self.param("kernel", init, shape, jnp.float32).astype(x.dtype)
        return unit(x) @ prepared(self, lambda: unit(kernel(), 0))


class CosineWideResNet(wide_resnet.PreActivated):
    """Images [B, H, W, C] float in [0, 1] to logits [B, num_classes] in [-1, 1]."""

    def classified(self, features: jax.Array) -> jax.Array:
        return Cosines(self.num_classes, name="fc")(features)


FAMILY = family.Family(
    build=partial(wide_resnet.build, kind=CosineWideResNet),
    sized_by=("depth", "widen_factor"),
    fields=wide_resnet.FAMILY.fields,
    archs={"cosine_wrn34_20": wide_resnet.arch(34, 20, family.DEEPMIND[10])},
    torch=dataclasses.replace(
        wide_resnet.NAMES,
        look_alikes={},
        unsaid=lambda fields: {"name": "a file that lost fc.bias looks the same"},
        published="Pang2020 (Boosting adversarial training)",
    ),
)
