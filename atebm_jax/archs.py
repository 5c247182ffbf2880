"""Architectures by their usual names: what each sets in `config.model`."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from atebm_jax.config import default
from atebm_jax.errors import UserError, check_choice
from atebm_jax.models import FAMILIES

#: Number of classes and input normalisation are those of the data that public weights
#: were trained on. Weights trained on other data need others.
ARCHS: dict[str, dict[str, Any]] = {
    name: {"name": family, **values}
    for family, networks in FAMILIES.items()
    for name, values in networks.archs.items()
}


def arch(name: str) -> dict[str, Any]:
    """The fields that an architecture of `ARCHS` sets in `config.model`.

    Raises:
      UserError: any other name.
    """
    check_choice("architecture", name, ARCHS)
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
    # A family may have fields of its own.
    model.update(arch(name))
    for field in overrides:
        if field not in model:
            raise UserError(
                f"config.model has no field {field!r}: it has {', '.join(model)}."
            )
    model.update(overrides)
    return model


def describe(model: ml_collections.ConfigDict) -> str:
    """Family and size in one word: "wide_resnet-34-10", "convnext-large-conv"."""
    sizes = (str(model[field]) for field in FAMILIES[model.name].sized_by)
    return "-".join((model.name, *sizes))


def name_of(model: Mapping[str, Any]) -> str | None:
    """The architecture that a `config.model` describes, or None.

    Classes, input normalisation and a ViT's grid may differ.
    """
    for name, values in ARCHS.items():
        fields = ("name", *FAMILIES[values["name"]].sized_by)
        if all(model.get(field) == values[field] for field in fields):
            return name
    return None
