"""Architectures by their usual names: what each sets in `config.model`."""

from typing import Any

import ml_collections

from atebm_jax.config import default
from atebm_jax.errors import UserError

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CIFAR10 = {
    "mean": (0.4913997551666284, 0.48215855929893703, 0.4465309133731618),
    "std": (0.24703225141799082, 0.24348516474564, 0.26158783926049628),
}


def _wide_resnet(depth: int, widen_factor: int) -> dict[str, Any]:
    values = {"name": "wide_resnet", "depth": depth, "widen_factor": widen_factor}
    return values | {"num_classes": 10} | CIFAR10


def _resnet(depth: int, base_width: int = 64) -> dict[str, Any]:
    values = {"name": "resnet", "depth": depth, "base_width": base_width}
    return values | {"num_classes": 1000} | IMAGENET


def _convnext(size: str, stem: str) -> dict[str, Any]:
    # The paper's ConvNeXts see pixels as they are. Weights trained on normalised images
    # need `IMAGENET` beside them.
    values = {"name": "convnext", "size": size, "stem": stem, "num_classes": 1000}
    return values | {"mean": (), "std": ()}


def _vit(size: str, stem: str, **normalisation: Any) -> dict[str, Any]:
    values = {"name": "vit", "size": size, "stem": stem, "position_grid": 14}
    return values | {"num_classes": 1000} | normalisation


#: Number of classes and input normalisation are those of the data set that the public
#: weights were trained on; give another where weights say otherwise.
ARCHS: dict[str, dict[str, Any]] = {
    "wrn16_4": _wide_resnet(16, 4),
    "wrn28_10": _wide_resnet(28, 10),
    "wrn34_10": _wide_resnet(34, 10),
    "wrn70_16": _wide_resnet(70, 16),
    "resnet18": _resnet(18),
    "resnet34": _resnet(34),
    "resnet50": _resnet(50),
    "resnet101": _resnet(101),
    "wide_resnet50_2": _resnet(50, 128),
    "wide_resnet50_4": _resnet(50, 256),
    "convnext_tiny": _convnext("tiny", "patch"),
    "convnext_small": _convnext("small", "patch"),
    "convnext_base": _convnext("base", "patch"),
    "convnext_large": _convnext("large", "patch"),
    "convnext_tiny_cvst": _convnext("tiny", "conv"),
    "convnext_small_cvst": _convnext("small", "conv"),
    "convnext_base_cvst": _convnext("base", "conv"),
    "convnext_large_cvst": _convnext("large", "conv"),
    "vit_s": _vit("small", "patch", **IMAGENET),
    "vit_b": _vit("base", "patch", **IMAGENET),
    # Of the public robust ViTs with a ConvStem only the small one normalises.
    "vit_s_cvst": _vit("small", "conv", **IMAGENET),
    "vit_b_cvst": _vit("base", "conv", mean=(), std=()),
}


def arch(name: str) -> dict[str, Any]:
    """What an architecture sets in `config.model`: field to value.

    Args:
      name: a key of `ARCHS`.

    Raises:
      UserError: any other name.
    """
    if name not in ARCHS:
        raise UserError(
            f"unknown architecture {name!r}: choose one of {', '.join(ARCHS)}."
        )
    return dict(ARCHS[name])


def model_config(name: str, **overrides: Any) -> ml_collections.ConfigDict:
    """A complete `config.model` of an architecture.

    Args:
      name: a key of `ARCHS`.
      overrides: other fields, or other values: `num_classes=10`.

    Raises:
      UserError: an unknown architecture or field.
    """
    model = default().model
    for field, value in (arch(name) | overrides).items():
        if field not in model:
            raise UserError(
                f"config.model has no field {field!r}: it has {', '.join(model)}."
            )
        model[field] = value
    return model


#: The fields of `config.model` that give a family's networks their size.
SIZED_BY: dict[str, tuple[str, ...]] = {
    "wide_resnet": ("depth", "widen_factor"),
    "resnet": ("depth", "base_width"),
    "convnext": ("size", "stem"),
    "vit": ("size", "stem"),
}


def describe(model: ml_collections.ConfigDict) -> str:
    """Family and size in one word: "wide_resnet-34-10", "convnext-large-conv"."""
    sizes = (str(model[field]) for field in SIZED_BY[model.name])
    return "-".join((model.name, *sizes))


def name_of(model: ml_collections.ConfigDict) -> str | None:
    """The architecture that a `config.model` describes, or None.

    Classes, input normalisation and a ViT's grid may differ.
    """
    for name, values in ARCHS.items():
        fields = ("name", *SIZED_BY[values["name"]])
        if all(model.get(field) == values[field] for field in fields):
            return name
    return None
