"""ConvNeXt (Liu et al., 2022), with patches or a ConvStem in front.

ConvNeXt-L with a ConvStem is the paper's best ImageNet network. It has no stochastic
depth and no dropout, as stage 2 uses none: nothing depends on `train`. The sum of the
residual branches is float32 also where the branches compute in bfloat16.
"""

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from atebm_jax.errors import UserError, check_choice
from atebm_jax.models import family
from atebm_jax.models.layers import (
    INIT,
    Dense,
    LayerNorm,
    at_least_float32,
    gelu,
    layer_norm,
    mlp,
    sparsified,
)
from atebm_jax.models.stem import (
    STEMS,
    ConvStem,
    PatchStem,
    biased_conv,
    conv_stem_rules,
)

# Blocks and channels of each of the four stages.
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}

# (channels, stride) of each convolution of the ConvStem.
CONV_STEMS: dict[str, tuple[tuple[int, int], ...]] = {
    "tiny": ((48, 2), (96, 2)),
    "small": ((48, 2), (96, 2)),
    "base": ((64, 2), (96, 2), (128, 1)),
    "large": ((96, 2), (144, 2), (192, 1)),
}

# Pixels a side: stem and stages divide by this.
_SMALLEST = 32


class Block(nn.Module):
    """Depthwise 7x7, norm, two dense layers with GELU between, scaled and added.

    Attributes:
      sparse: whether `MeanSparse` precedes GELU and the sum.
    """

    dtype: Any
    sparse: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        y = biased_conv(
            channels, 7, padding=3, groups=channels, dtype=self.dtype, name="depthwise"
        )(x)
        active = lambda y: gelu(sparsified(y, "sparse1", self))
        init = nn.initializers.constant(1e-6)
        gamma = lambda: self.param("gamma", init, (channels,), jnp.float32)
        y = mlp(y, self.dtype, LayerNorm(name="norm"), gamma, active)
        return x + sparsified(y, "sparse2", self)


class Downsample(nn.Module):
    """Norm and a 2x2 convolution of stride 2 between two stages."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = biased_conv(self.features, 2, 2, dtype=self.dtype, name="conv")
        return at_least_float32(conv(layer_norm(x, "norm")))


class ConvNeXt(family.Network):
    """Images [B, H, W, C] float in [0, 1] to logits [B, num_classes] float32.

    Attributes:
      size: a key of `SIZES`.
      stem: "patch" (4x4) or "conv" (`CONV_STEMS`).
      sparse: as of `Block`.
    """

    size: str
    stem: str = "patch"
    sparse: bool = False

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, features: bool = False
    ) -> jax.Array:
        """Logits, or the normalised pooled features [B, channels] before them.

        Raises:
          UserError: fewer than 32 pixels a side.
        """
        del train
        if min(images.shape[1:3]) < _SMALLEST:
            raise UserError(
                f"image_shape begins with {images.shape[1:3]}: a ConvNeXt needs at "
                f"least {_SMALLEST} pixels on both sides."
            )
        block = nn.remat(Block) if self.remat else Block
        blocks, channels = SIZES[self.size]
        x = self.normalised(images)
        stem: nn.Module
        if self.stem == "conv":
            stem = ConvStem(CONV_STEMS[self.size], dtype=self.dtype, name="stem")
        else:
            stem = PatchStem(channels[0], 4, True, dtype=self.dtype, name="stem")
        x = at_least_float32(stem(x))
        for stage, num_blocks in enumerate(blocks):
            if stage > 0:
                name = f"downsample{stage}"
                x = Downsample(channels[stage], dtype=self.dtype, name=name)(x)
            for index in range(num_blocks):
                name = f"stage{stage}_{index}"
                x = block(dtype=self.dtype, sparse=self.sparse, name=name)(x)
        x = layer_norm(x.mean(axis=(1, 2)), "norm")
        fc = Dense(self.num_classes, kernel_init=INIT, name="fc")
        return x if features else fc(x)


def build(config: ml_collections.ConfigDict) -> ConvNeXt:
    """Builds a ConvNeXt from `config.model`.

    Raises:
      UserError: unknown size or stem.
    """
    check_choice("model.size", config.size, SIZES, of=" of a ConvNeXt")
    check_choice("model.stem", config.stem, STEMS)
    return ConvNeXt(**family.network_fields(config, "size", "stem"))


def _aliases() -> Iterator[tuple[str, str]]:
    # The authors' release.
    yield "downsample_layers.0.{k}.{leaf}", "stem.{k}.{leaf}"
    yield "downsample_layers.{s}.{k}.{leaf}", "stages.{s}.downsample.{k}.{leaf}"
    block = "stages.{s}.blocks.{b}"
    yield "stages.{s}.{b}.dwconv.{leaf}", f"{block}.conv_dw.{{leaf}}"
    yield "stages.{s}.{b}.norm.{leaf}", f"{block}.norm.{{leaf}}"
    yield "stages.{s}.{b}.pwconv{k}.{leaf}", f"{block}.mlp.fc{{k}}.{{leaf}}"
    yield "stages.{s}.{b}.gamma", f"{block}.gamma"
    yield "norm.{leaf}", "head.norm.{leaf}"
    yield "head.{leaf}", "head.fc.{leaf}"
    # torchvision: stem, stage, downsampling, stage, ... in one sequence.
    yield "features.0.{k}.{leaf}", "stem.{k}.{leaf}"
    for s in range(4):
        theirs, ours = f"features.{2 * s + 1}.{{b}}", f"stages.{s}.blocks.{{b}}"
        parts = ((0, "conv_dw"), (2, "norm"), (3, "mlp.fc1"), (5, "mlp.fc2"))
        for index, part in parts:
            yield f"{theirs}.block.{index}.{{leaf}}", f"{ours}.{part}.{{leaf}}"
        yield f"{theirs}.layer_scale", f"{ours}.gamma"
        ours = f"stages.{s}.downsample.{{k}}.{{leaf}}"
        yield f"features.{2 * s}.{{k}}.{{leaf}}", ours
    yield "classifier.0.{leaf}", "head.norm.{leaf}"
    yield "classifier.2.{leaf}", "head.fc.{leaf}"


def _fields(shapes: family.Shapes) -> dict[str, Any]:
    template = "stages.{}.blocks.{{}}.conv_dw.weight"
    blocks = tuple(family.count(shapes, template.format(stage)) for stage in range(4))
    width = family.outputs(shapes, "stages.0.blocks.0.conv_dw.weight")
    found = {"stem": "conv" if "stem.stem.0.weight" in shapes else "patch"}
    for size, (counts, widths) in SIZES.items():
        if counts == blocks and widths[0] == width:
            found["size"] = size
    return found


def _arch(size: str, stem: str) -> dict[str, Any]:
    # The paper's ConvNeXts have no input normalisation. Weights that were trained on
    # normalised images need ImageNet's.
    return {"size": size, "stem": stem, "num_classes": 1000, **family.AS_THEY_ARE}


FAMILY = family.Family(
    build=build,
    sized_by=("size", "stem"),
    fields={
        # "tiny", "small", "base" or "large".
        "size": "base",
        # First layers: "patch", or "conv" for convolutions (ConvStem).
        "stem": "patch",
    },
    archs={f"convnext_{size}": _arch(size, "patch") for size in SIZES}
    | {f"convnext_{size}_cvst": _arch(size, "conv") for size in SIZES},
    activation="gelu",
    compiled_share=0.41,
    # The names of timm.
    torch=family.TorchNames(
        rules=(
            ("stem.0", "stem/proj"),
            ("stem.1", "stem/norm"),
            *conv_stem_rules("stem.stem", 3),
            ("stages.{s}.downsample.0", "downsample{s}/norm"),
            ("stages.{s}.downsample.1", "downsample{s}/conv"),
            ("stages.{s}.blocks.{b}", "stage{s}_{b}"),
            ("stages.{s}.blocks.{b}.conv_dw", "stage{s}_{b}/depthwise"),
            ("stages.{s}.blocks.{b}.norm", "stage{s}_{b}/norm"),
            ("stages.{s}.blocks.{b}.mlp.fc{k}", "stage{s}_{b}/fc{k}"),
            ("head.norm", "norm"),
            ("head.fc", "fc"),
        ),
        mark="stages.0.blocks.0.conv_dw.weight",
        first=("stem.0.weight", "stem.stem.0.weight"),
        fields=_fields,
        side=lambda model: 256,
        # All weights with a ConvStem come from one release (Singh et al., 2023).
        usual=lambda model: family.AS_THEY_ARE if model["stem"] == "conv" else None,
        who="--normalization=imagenet (timm, torchvision, the authors, Liu2023) or "
        "--normalization=none (DAT and others trained on pixels as they are)",
        published="the authors, timm, torchvision; Liu2023 and Singh2023 (ConvStem) of "
        "RobustBench; DAT for ImageNet",
        aliases=tuple(_aliases()),
        bare={"gamma": 1},
        look_alikes={"a ConvNeXt V2": r".*\.grn\.(weight|bias|gamma|beta)"},
    ),
)
