"""PyTorch names and layouts of a family's parameters, to ours and back.

The names are those of timm for ResNets, ConvNeXts and ViTs and those of the usual
WideResNet for small images. Names under which other sources keep the same parameters
(torchvision, the ConvNeXt authors) are read too; what is written has the first.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax
import numpy as np

from atebm_jax.errors import UserError

# Templates of names: PyTorch's, ours; {word} stands for a number, the same on both
# sides. The last part of a name (weight, bias, ...) is no part of the template.
Rules = tuple[tuple[str, str], ...]

_WIDE_RESNET: Rules = (
    ("conv1", "conv1"),
    ("block{g}.layer.{b}.conv{k}", "block{g}_{b}/conv{k}"),
    ("block{g}.layer.{b}.bn{k}", "block{g}_{b}/bn{k}"),
    ("block{g}.layer.{b}.convShortcut", "block{g}_{b}/shortcut"),
    ("bn1", "bn1"),
    ("fc", "fc"),
)

_RESNET: Rules = (
    ("conv1", "conv1"),
    ("bn1", "bn1"),
    ("layer{s}.{b}.conv{k}", "layer{s}_{b}/conv{k}"),
    ("layer{s}.{b}.bn{k}", "layer{s}_{b}/bn{k}"),
    ("layer{s}.{b}.downsample.0", "layer{s}_{b}/shortcut"),
    ("layer{s}.{b}.downsample.1", "layer{s}_{b}/shortcut_bn"),
    ("fc", "fc"),
)


def _conv_stem(prefix: str, layers: int) -> Rules:
    """Convolution, norm, activation in turn, counted through by PyTorch."""
    rules: list[tuple[str, str]] = []
    for index in range(layers):
        rules.append((f"{prefix}.{3 * index}", f"stem/conv{index}"))
        rules.append((f"{prefix}.{3 * index + 1}", f"stem/norm{index}"))
    return tuple(rules)


_CONVNEXT: Rules = (
    ("stem.0", "stem/proj"),
    ("stem.1", "stem/norm"),
    *_conv_stem("stem.stem", 3),
    ("stages.{s}.downsample.0", "downsample{s}/norm"),
    ("stages.{s}.downsample.1", "downsample{s}/conv"),
    ("stages.{s}.blocks.{b}", "stage{s}_{b}"),
    ("stages.{s}.blocks.{b}.conv_dw", "stage{s}_{b}/depthwise"),
    ("stages.{s}.blocks.{b}.norm", "stage{s}_{b}/norm"),
    ("stages.{s}.blocks.{b}.mlp.fc{k}", "stage{s}_{b}/fc{k}"),
    ("head.norm", "norm"),
    ("head.fc", "fc"),
)

_VIT: Rules = (
    ("", ""),
    ("patch_embed.proj", "stem/proj"),
    *_conv_stem("patch_embed.proj.stem", 4),
    ("patch_embed.proj.stem.12", "stem/out"),
    ("blocks.{b}.norm{k}", "block{b}/norm{k}"),
    ("blocks.{b}.attn.qkv", "block{b}/qkv"),
    ("blocks.{b}.attn.proj", "block{b}/proj"),
    ("blocks.{b}.mlp.fc{k}", "block{b}/fc{k}"),
    ("norm", "norm"),
    ("head", "fc"),
)

RULES: dict[str, Rules] = {
    "wide_resnet": _WIDE_RESNET,
    "resnet": _RESNET,
    "convnext": _CONVNEXT,
    "vit": _VIT,
}


def _convnext_aliases() -> Iterator[tuple[str, str]]:
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
        yield (
            f"features.{2 * s}.{{k}}.{{leaf}}",
            f"stages.{s}.downsample.{{k}}.{{leaf}}",
        )
    yield "classifier.0.{leaf}", "head.norm.{leaf}"
    yield "classifier.2.{leaf}", "head.fc.{leaf}"


def _vit_aliases() -> Iterator[tuple[str, str]]:
    # torchvision.
    yield "class_token", "cls_token"
    yield "encoder.pos_embedding", "pos_embed"
    yield "conv_proj.{leaf}", "patch_embed.proj.{leaf}"
    theirs, ours = "encoder.layers.encoder_layer_{b}", "blocks.{b}"
    yield f"{theirs}.ln_{{k}}.{{leaf}}", f"{ours}.norm{{k}}.{{leaf}}"
    attention = f"{theirs}.self_attention"
    yield f"{attention}.in_proj_{{leaf}}", f"{ours}.attn.qkv.{{leaf}}"
    yield f"{attention}.out_proj.{{leaf}}", f"{ours}.attn.proj.{{leaf}}"
    yield f"{theirs}.mlp.0.{{leaf}}", f"{ours}.mlp.fc1.{{leaf}}"
    yield f"{theirs}.mlp.3.{{leaf}}", f"{ours}.mlp.fc2.{{leaf}}"
    yield f"{theirs}.mlp.linear_{{k}}.{{leaf}}", f"{ours}.mlp.fc{{k}}.{{leaf}}"
    yield "encoder.ln.{leaf}", "norm.{leaf}"
    yield "heads.head.{leaf}", "head.{leaf}"


# Whole names of other sources, and the names they are read as.
ALIASES: dict[str, Rules] = {
    "wide_resnet": (),
    "resnet": (),
    "convnext": tuple(_convnext_aliases()),
    "vit": tuple(_vit_aliases()),
}

# Parameters that are no layer's weight or bias, and keep name and shape.
_BARE = ("gamma", "cls_token", "pos_embed")


def from_torch(family: str, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Turns a PyTorch state dict into Flax variables.

    Args:
      family: a key of `atebm_jax.models.MODELS`.
      state_dict: arrays by PyTorch name, without any wrapper's prefix; convolutions
        OIHW, linear layers [out, in]. `num_batches_tracked` is passed over.

    Returns:
      {"params": ...} and, with batch normalisation, "batch_stats"; convolutions HWIO,
      dense layers [in, out]. The arrays keep their dtypes.

    Raises:
      UserError: a name that the family does not have, or one parameter twice.
    """
    flat: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    for name, array in state_dict.items():
        if name.rpartition(".")[2] == "num_batches_tracked":
            continue
        path, value = one_from_torch(family, name, np.asarray(array))
        if path in flat:
            raise UserError(
                f"{name!r} and {origin[path]!r} are the same parameter of a {family}: "
                "expected one state dict, with one naming."
            )
        flat[path], origin[path] = value, name
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def to_torch(family: str, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Turns Flax variables into a PyTorch state dict: the inverse of `from_torch`.

    Args:
      family: a key of `atebm_jax.models.MODELS`.
      variables: {"params": ...} and, where the family has it, "batch_stats".

    Returns:
      Contiguous arrays by name (timm's, and for "wide_resnet" those of the usual
      implementation). `num_batches_tracked` is left out: PyTorch's strict loading of a
      plain dict does without.

    Raises:
      UserError: a variable that the family does not have.
    """
    flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
    made = (one_to_torch(family, path, np.asarray(x)) for path, x in flat.items())
    return {name: np.ascontiguousarray(value) for name, value in made}


def canonical(family: str, name: str) -> str:
    """The name that `to_torch` would give what another source calls `name`."""
    return _rename(ALIASES[family], name) or name


def one_from_torch(family: str, name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """One array of `from_torch`: its path in the variables, and its layout there."""
    known = canonical(family, name)
    module, _, leaf = known.rpartition(".")
    path = _rename(RULES[family], module)
    if path is not None and leaf in _BARE:
        value = array.reshape(-1) if leaf == "gamma" else array
        return _join("params", path, leaf), value
    if path and leaf in ("running_mean", "running_var"):
        return f"batch_stats/{path}/{leaf.removeprefix('running_')}", array
    if path and leaf == "bias" and array.ndim == 1:
        return f"params/{path}/bias", array
    if path and leaf == "weight" and array.ndim == 4:
        return f"params/{path}/kernel", array.transpose(2, 3, 1, 0)
    if path and leaf == "weight" and array.ndim == 2:
        return f"params/{path}/kernel", array.T
    if path and leaf == "weight" and array.ndim == 1:
        return f"params/{path}/scale", array
    example = re.sub(r"{\w+}", "0", RULES[family][-2][0])
    raise UserError(
        f"{name!r} with shape {array.shape} is no parameter of a {family}: expected "
        f"names such as '{example}.weight' or '{RULES[family][-1][0]}.bias'."
    )


def one_to_torch(family: str, path: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """One array of `to_torch`: its PyTorch name, and its layout there (a view)."""
    collection, _, rest = path.partition("/")
    module, _, leaf = rest.rpartition("/")
    inverse = tuple((ours, theirs) for theirs, ours in RULES[family])
    name = _rename(inverse, module)
    if collection == "batch_stats" and leaf in ("mean", "var") and name:
        return f"{name}.running_{leaf}", array
    if collection == "params" and name is not None and leaf in _BARE:
        return (f"{name}.{leaf}" if name else leaf), array
    if collection == "params" and leaf in ("bias", "scale") and name:
        return f"{name}.{'bias' if leaf == 'bias' else 'weight'}", array
    if collection == "params" and leaf == "kernel" and name:
        layout = (3, 2, 0, 1) if array.ndim == 4 else (1, 0)
        return f"{name}.weight", array.transpose(layout)
    raise UserError(
        f"{path!r} with shape {array.shape} is no variable of a {family}: expected "
        f"names such as 'params/{RULES[family][-1][1]}/kernel'."
    )


def _rename(rules: Rules, name: str) -> str | None:
    """The name on the other side of the first rule that fits."""
    for before, after in rules:
        match = re.fullmatch(_pattern(before), name)
        if match:
            return after.format(**match.groupdict())
    return None


def _pattern(template: str) -> str:
    escaped = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    escaped = escaped.replace("{leaf}", "(?P<leaf>weight|bias)")
    return re.sub(r"{(\w+)}", r"(?P<\1>\\d+)", escaped)


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)
