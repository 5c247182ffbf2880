"""Weights that were trained for another function of the same shapes are refused."""

import itertools
import json
import re
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
import reference
import tiny
from ml_collections import ConfigDict

from atebm_jax import UserError, archs, config, fitting, models
from atebm_jax.models.family import Family

# Of `config.model`: what changes no function.
MEMORY = {"dtype", "remat"}
# What a family reads without a word, the last one where it has several.
OF_ALL = {"num_classes", "mean", "std", "standardize", "activation"} | MEMORY
# Read, so that a wrong value is told, and not used.
UNUSED = {"dm_preact_resnet": {"final_norm", "shortcut"}}
# One value more of each field, and another where a family has not that one.
OTHERS = {
    "depth": (16, 34, 101),
    "widen_factor": (2,),
    "base_width": (128,),
    "blocks": ("1-2-1", "1-2-1-1"),
    "widths": ("4-8-8-8", "4-8-8-16-24"),
    "final_norm": (False,),
    "shortcut": ("raw",),
    "size": ("base", "medium"),
    "stem": ("conv",),
    "position_grid": (16,),
    "patch": (8,),
    "window": (1,),
    "norm_epsilon": (1e-6,),
    "num_classes": (7,),
    "mean": ((0.5, 0.5, 0.5),),
    "std": ((0.25, 0.5, 0.5),),
    "standardize": (True,),
    "activation": ("swish",),
}


def described(**fields) -> ConfigDict:
    model = config.default().model
    model.update({n.removeprefix("model."): x for n, x in fields.items()})
    return model


def refused(expected, stored) -> bool:
    try:
        fitting.check_function(expected, json.loads(stored.to_json()), "runs/x")
    except UserError:
        return True
    return False


class Noting(ConfigDict):
    """Notes which of its fields are read."""

    def __getitem__(self, key):
        self.__dict__.setdefault("read", set()).add(key)
        return super().__getitem__(key)


def read_by(model: ConfigDict) -> set[str]:
    noting = Noting(model)
    noting.__dict__["read"] = set()
    models.FAMILIES[model.name].build(noting)
    return noting.__dict__["read"]


def altered(model: ConfigDict, field: str) -> ConfigDict | None:
    """The same config with another value of a field, where the family can build one.

    Of a ResNet-18 nothing else has another width.
    """
    for value in OTHERS[field]:
        made = model.copy_and_resolve_references()
        made[field] = value
        try:
            models.build(made)
        except UserError:
            continue
        return made
    assert (field, model.depth) == ("base_width", 18)
    return None


@pytest.mark.parametrize("network", tiny.NETWORKS, ids=str)
def test_every_field_that_a_family_reads_is_declared_and_compared(network):
    """`tiny.NETWORKS` has all families, and `OTHERS` every field."""
    model = described(**network)
    assert OTHERS.keys() == set(model) - MEMORY - {"name"}
    read, family = read_by(model), models.FAMILIES[model.name]
    assert read - OF_ALL == family.fields.keys()
    assert ("activation" in read) == (family.activation is None)
    decisive = read - MEMORY - {"name"} - UNUSED.get(model.name, set())
    for field in OTHERS:
        if field in decisive:
            made = altered(model, field)
            assert made is None or refused(model, made), field
        else:
            other = model.copy_and_resolve_references()
            other[field] = OTHERS[field][0]
            assert not refused(model, other), field
    assert not refused(model, described(**network, dtype="bfloat16", remat=True))


WIDE = {"depth": 10, "widen_factor": 1, "blocks": "1-1-1", "widths": "16-16-32-64"}
WIDE |= {"activation": "swish"}
SHAPE = (32, 32, 3)


def test_families_of_one_shape_pass_where_their_logits_are_equal(monkeypatch):
    """Same names and shapes: what decides is the logits on the same weights."""
    reference.shallow(monkeypatch)
    alike: dict[str, dict[str, ConfigDict]] = {}
    for network in tiny.NETWORKS:
        model = described(**network, activation="swish", window=1)
        if model.blocks == "1-1-1":
            model.widths = WIDE["widths"]
        shapes = models.variable_shapes(models.build(model), SHAPE)
        alike.setdefault(str(shapes), {})[model.name] = model
    (found,) = (group for group in alike.values() if len(group) > 1)
    weights = reference.random_variables(models.build(found["wide_resnet"]), SHAPE)
    images = np.random.default_rng(0).random((2, *SHAPE), np.float32)
    logits = {
        name: jax.jit(models.build(model).apply)(weights, images)
        for name, model in found.items()
    }
    families = {"wide_resnet", "dm_wide_resnet", "robust_wide_resnet", "wrn_a"}
    assert found.keys() == families
    for first, second in itertools.permutations(found, 2):
        away = np.abs(logits[first] - logits[second]).max()
        assert refused(found[first], found[second]) == (away > 0), (first, second)
        assert not 0 < away < 1e-3


def test_weights_of_a_family_that_pads_otherwise_are_refused():
    expected, stored = (
        described(name=n, **WIDE) for n in ("wide_resnet", "dm_wide_resnet")
    )
    message = (
        "config.model.name is 'wide_resnet' and the weights of runs/x were trained "
    )
    message += "with 'dm_wide_resnet': give --config.model.name='dm_wide_resnet'."
    with pytest.raises(UserError, match=re.escape(message)):
        fitting.check_function(expected, stored.to_dict(), "runs/x")


def test_of_equal_families_the_field_that_differs_is_named():
    expected = described(name="wide_resnet", **WIDE)
    stored = described(name="wrn_a", **WIDE | {"activation": "relu"}).to_dict()
    # What the other family does not read says nothing.
    stored["depth"] = 34
    with pytest.raises(UserError, match="--config.model.activation='relu'"):
        fitting.check_function(expected, stored, "runs/x")


def test_normalisations_that_differ_by_rounding_are_one():
    expected, stored = (archs.model_config("resnet18") for _ in range(2))
    stored.mean = (0.485, 0.456, 0.406004)
    assert not refused(expected, stored)
    stored.mean = (0.485, 0.456, 0.41)
    assert refused(expected, stored)


def test_windows_that_are_the_same_are_one_function():
    """Windows of 7 patches fit four times into both grids."""
    expected = archs.model_config("swin_b")
    assert not refused(expected, archs.model_config("swin_b", position_grid=64))
    assert refused(expected, archs.model_config("swin_b", position_grid=16))


class Filtered(nn.Module):
    """What a user may write: an array among the attributes."""

    kernel: np.ndarray
    num_classes: int


def test_network_of_the_users_own_is_compared_by_its_attributes(monkeypatch):
    def build(model):
        return Filtered(np.full(3, model.depth), model.num_classes)

    family = Family(build=build, sized_by=())
    expected, stored = described(name="own", depth=3), described(name="own", depth=3)
    monkeypatch.setitem(models.FAMILIES, "own", family)
    stored.widen_factor = 5
    assert not refused(expected, stored)
    stored.depth = 4
    with pytest.raises(UserError, match="--config.model.depth=4"):
        fitting.check_function(expected, stored.to_dict(), "runs/x")


@pytest.mark.parametrize(
    ("attribute", "same"),
    [
        (lambda model: np.ones(model.depth), False),  # of other lengths
        (lambda model: 0.5, True),
    ],
)
def test_attributes_of_any_kind_are_compared(monkeypatch, attribute, same):
    class Own(nn.Module):
        mean: Any
        num_classes: int

    def build(model):
        return Own(attribute(model), model.num_classes)

    monkeypatch.setitem(models.FAMILIES, "own", Family(build=build, sized_by=()))
    stored = described(name="own", depth=1)
    assert refused(described(name="own", depth=3), stored) is not same


def test_field_that_is_newer_than_the_weights_is_not_compared(monkeypatch):
    def build(model):
        return Filtered(np.full(3, model.slope), model.num_classes)

    monkeypatch.setitem(models.FAMILIES, "own", Family(build=build, sized_by=()))
    expected, stored = described(name="own"), described(name="own", depth=3)
    expected.slope = 0.1
    assert not refused(expected, stored)


def test_weights_of_a_family_that_is_not_known_here_are_refused():
    expected, stored = described(), described(name="own", activation="swish")
    with pytest.raises(UserError, match="name is 'wide_resnet' .*'own'"):
        fitting.check_function(expected, stored.to_dict(), "runs/x")
