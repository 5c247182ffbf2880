"""Which architecture a state dict is of: from names and shapes alone."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from atebm_jax.convert.names import canonical
from atebm_jax.models import convnext, resnet, vit

Shapes = Mapping[str, tuple[int, ...]]

# A name by which each family is known; the first that fits.
_MARKS: dict[str, str] = {
    "wide_resnet": r"block1\.layer\.0\.conv1\.weight",
    "resnet": r"layer1\.0\.conv1\.weight",
    "convnext": r"stages\.0\.(blocks\.0\.conv_dw|0\.dwconv)\.weight|"
    r"features\.1\.0\.block\.0\.weight",
    "vit": r"blocks\.0\.attn\.qkv\.weight|"
    r"encoder\.layers\.encoder_layer_0\.self_attention\.in_proj_weight",
}


def family_of(names: Mapping[str, Any]) -> str | None:
    """The family (a key of `models.MODELS`) that has such names, or None."""
    for family, pattern in _MARKS.items():
        if any(re.fullmatch(pattern, name) for name in names):
            return family
    return None


# Networks that are not built here and have names of one that is, or are often met.
_FOREIGN: tuple[tuple[str, str], ...] = (
    (
        r"(cls_attn_blocks|pos_embed(er)?\.token_projection|blocks\.\d+\.local_mp)\..*",
        "an XCiT (cross-covariance attention)",
    ),
    (r"blocks_token_only\..*", "a CaiT (class attention)"),
    (r"dist_token|head_dist\..*", "a distilled DeiT (a second token and head)"),
    (r"(reg_token|register_tokens)", "a ViT with register tokens"),
    (r"mask_token|decoder_blocks\..*", "a masked autoencoder's ViT"),
    (r"blocks\.\d+\.(ls1\.gamma|gamma_1)", "a ViT with layer scale (BEiT, DeiT III)"),
    (
        r".*\.relative_position_bias_table",
        "a transformer with relative positions (Swin, say)",
    ),
    (r".*\.grn\.(weight|bias|gamma|beta)", "a ConvNeXt V2"),
    (
        r"init_conv\.weight|layer\.\d+\.block\.\d+\.conv_0\.weight",
        "DeepMind's WideResNet (Gowal2020, Rebuffi2021, Wang2023)",
    ),
    (
        r"layer\d\.\d+\.conv\d\.bias",
        "a WideResNet with biases in its convolutions (JEM's, with leaky ReLU)",
    ),
    (
        r"layer\d\.\d+\.shortcut\.\d\.weight",
        "a ResNet for small images (a PreActResNet, say, or pytorch-cifar's ResNet)",
    ),
    (r"layer\d\.\d+\.se\..*", "a ResNet with squeeze and excitation"),
    (r"conv1\.\d\.weight", "a ResNet-D (three convolutions first)"),
    (
        r"root\.conv\.weight|block1\.unit01\..*|stages\.\d+\.blocks\.\d+\.conv3\.weight",
        "a ResNet V2 (BiT)",
    ),
    (r"blocks\.\d+\.(attn\.q_bias|mlp\.(w1|w12|fc1_g)\.weight)", "an EVA transformer"),
)


def foreign(shapes: Shapes) -> str | None:
    """What a network is that is not built here, though its names may look like one."""
    for pattern, what in _FOREIGN:
        if any(re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) for name in shapes):
            return what
    first, second = (
        shapes.get(f"layer1.0.conv{k}.weight", ())[index : index + 1]
        for k, index in ((1, 0), (2, 1))
    )
    return "a ResNeXt (grouped convolutions)" if () < second < first else None


def looks_like_network(names: Iterable[str]) -> bool:
    """Whether a whole network of some family is among names, under any prefix.

    Its first layer must be there too: a stage of a hierarchical transformer (Swin) has
    a ViT's names otherwise.
    """
    listed = list(names)
    for family, pattern in _MARKS.items():
        mark = re.compile(rf"((?:.*\.)?)(?:{pattern})")
        prefixes = {match[1] for match in map(mark.fullmatch, listed) if match}
        for prefix in prefixes:
            inner = (n.removeprefix(prefix) for n in listed if n.startswith(prefix))
            if any(canonical(family, name) in _FIRST[family] for name in inner):
                return True
    return False


def fields(family: str, shapes: Shapes) -> dict[str, Any]:
    """What the shapes say about `config.model`; what they leave open is left out.

    Args:
      family: as of `family_of`.
      shapes: of every array, PyTorch layouts, by name.

    Returns:
      Fields of `config.model` with their values; always "name".
    """
    known = {canonical(family, name): tuple(shape) for name, shape in shapes.items()}
    found = {"name": family} | _FIELDS[family](known)
    head = known.get(_HEADS[family], ())
    if len(head) == 2 and head[0]:
        found["num_classes"] = head[0]
    return found


def channels(family: str, shapes: Shapes) -> int:
    """Channels of the images: inputs of the first convolution, or 3."""
    known = {canonical(family, name): tuple(shape) for name, shape in shapes.items()}
    for name in _FIRST[family]:
        if len(known.get(name, ())) == 4:
            return known[name][1]
    return 3


_HEADS = {
    "wide_resnet": "fc.weight",
    "resnet": "fc.weight",
    "convnext": "head.fc.weight",
    "vit": "head.weight",
}
_FIRST = {
    "wide_resnet": ("conv1.weight",),
    "resnet": ("conv1.weight",),
    "convnext": ("stem.0.weight", "stem.stem.0.weight"),
    "vit": ("patch_embed.proj.weight", "patch_embed.proj.stem.0.weight"),
}


def _count(shapes: Shapes, pattern: str) -> int:
    """How many numbers the group of a pattern takes."""
    matches = (re.fullmatch(pattern, name) for name in shapes)
    return len({match[1] for match in matches if match})


def _outputs(shapes: Shapes, name: str) -> int:
    """First length of an array; 0 for a single number, which fits nothing."""
    return (*shapes[name], 0)[0]


def _wide_resnet(shapes: Shapes) -> dict[str, Any]:
    blocks = _count(shapes, r"block1\.layer\.(\d+)\.conv1\.weight")
    width = _outputs(shapes, "block1.layer.0.conv1.weight")
    return {"depth": 6 * blocks + 4, "widen_factor": max(width // 16, 1)}


def _resnet(shapes: Shapes) -> dict[str, Any]:
    blocks = tuple(
        _count(shapes, rf"layer{stage}\.(\d+)\.conv1\.weight") for stage in range(1, 5)
    )
    bottleneck = "layer1.0.conv3.weight" in shapes
    found: dict[str, Any] = {"base_width": 64}
    if bottleneck:
        found["base_width"] = _outputs(shapes, "layer1.0.conv1.weight")
    for depth, stages in resnet.STAGES.items():
        if stages == blocks and (depth >= 50) == bottleneck:
            found["depth"] = depth
    return found


def _convnext(shapes: Shapes) -> dict[str, Any]:
    blocks = tuple(
        _count(shapes, rf"stages\.{stage}\.blocks\.(\d+)\.conv_dw\.weight")
        for stage in range(4)
    )
    width = _outputs(shapes, "stages.0.blocks.0.conv_dw.weight")
    found = {"stem": "conv" if "stem.stem.0.weight" in shapes else "patch"}
    for size, (counts, widths) in convnext.SIZES.items():
        if tuple(counts) == blocks and widths[0] == width:
            found["size"] = size
    return found


def _vit(shapes: Shapes) -> dict[str, Any]:
    stem = "conv" if "patch_embed.proj.stem.0.weight" in shapes else "patch"
    found: dict[str, Any] = {"stem": stem}
    position = shapes.get("pos_embed", ())
    if len(position) == 3 and position[1] > 1:
        found["position_grid"] = math.isqrt(position[1] - 1)
    for size, (width, _) in vit.SIZES.items():
        if shapes["blocks.0.attn.qkv.weight"][-1:] == (width,):
            found["size"] = size
    return found


_FIELDS: dict[str, Callable[[Shapes], dict[str, Any]]] = {
    "wide_resnet": _wide_resnet,
    "resnet": _resnet,
    "convnext": _convnext,
    "vit": _vit,
}
