"""Where the input normalisation comes from: the file, the flags, or a named guess."""

import numpy as np
import pytest

from atebm_jax import UserError, archs
from atebm_jax.convert import normalization, values
from atebm_jax.convert.normalization import Declared, Normalization, declared
from atebm_jax.models.family import IMAGENET

NONE = Normalization((), (), "--normalization=none")
HALF = Normalization((0.5,), (0.5,), "--mean and --std")
NOTHING = Declared()


def decide(asked, in_file, arch="wrn28_10", channels=3):
    model = archs.model_config(arch)
    return normalization.decide(asked, in_file, model, channels, "w.pt")


@pytest.mark.parametrize(
    ("arch", "channels", "who"),
    [
        ("wrn28_10", 3, "none .TRADES.*cifar10 .DAT, RATIO.*Hendrycks2019"),
        ("wrn16_4", 1, "none.*MNIST"),
        ("convnext_large", 3, "imagenet .timm, torchvision.*none .DAT"),
        ("vit_b", 3, "imagenet .DeiT.*mean=0.5 --std=0.5.*none"),
        ("xcit_s12", 3, "none .Debenedetti2022. or .*imagenet"),
        ("resnet50", 1, "none.*MNIST"),
        ("swin_b", 3, "imagenet .the authors, timm.*--arch=swin_b_mimir .MIMIR"),
        ("wide_resnet50_2", 3, "imagenet .torchvision.*none .Chen2024"),
    ],
)
def test_where_two_conventions_are_common_one_must_be_given(arch, channels, who):
    with pytest.raises(UserError, match=f"w.pt does not say.*give --norm.*{who}"):
        decide(None, NOTHING, arch, channels)
    assert decide(NONE, NOTHING, arch, channels) == NONE
    assert decide(HALF, NOTHING, arch, channels).mean == (0.5,) * channels


@pytest.mark.parametrize(
    ("arch", "mean"),
    [
        ("resnet50", IMAGENET["mean"]),
        ("wide_resnet50_4", IMAGENET["mean"]),
        ("convnext_base_cvst", ()),
        ("vit_s_cvst", IMAGENET["mean"]),
        ("vit_b_cvst", ()),
        ("xcit_m12", ()),
        ("xcit_s12_p4", (0.4914, 0.4822, 0.4465)),
        ("swin_l", IMAGENET["mean"]),
        ("swin_b_mimir", ()),
        ("swin_l_mimir", ()),
    ],
)
def test_where_all_agree_it_is_assumed_and_said(arch, mean):
    chosen = decide(None, NOTHING, arch)
    assert chosen.mean == mean and chosen.assumed
    said = normalization.assumption(chosen)
    assert said.startswith("input normalisation: ") and "--normalization" in said
    assert (str(list(mean)) if mean else "none") in said
    assert not decide(NONE, NOTHING, arch).assumed


def test_what_the_file_says_is_taken_and_flags_against_it_are_refused():
    off = Declared(False, origin="the file: normalize_input is False")
    assert decide(None, off)[:2] == ((), ()) and decide(NONE, off).mean == ()
    with pytest.raises(UserError, match="the file itself.*normalize_input is False"):
        decide(HALF, off)
    given = Declared(True, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert decide(None, given)[:2] == given[1:3]
    assert not decide(None, given).assumed
    on = Declared(True, origin="the file: normalize_input is True")
    for asked in (None, NONE):
        with pytest.raises(UserError, match="normalize_input is True.*by which mean"):
            decide(asked, on)
    assert decide(HALF, on).mean == (0.5,) * 3


def test_file_that_contradicts_itself_leaves_it_to_the_flag():
    both = Declared(False, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(UserError, match="says that its input is not normalised"):
        decide(None, both)
    assert decide(NONE, both).mean == ()
    assert decide(HALF, both).mean == (0.5,) * 3


WEIGHTS = {"conv1.weight": np.ones((16, 3, 3, 3), np.float32)}
THREE = [0.25, 0.5, 0.75]
NAMESPACE = values.Inert("argparse.Namespace", state={"mean": THREE, "std": THREE})
# A subclass of a dictionary, as Lightning and others keep their settings in.
ATTRIBUTES = values.Inert("x.AttributeDict", items={"normalize_input": False, 3: 4})


@pytest.mark.parametrize(
    ("tree", "normalizes", "mean"),
    [
        (WEIGHTS, None, ()),
        ({"state_dict": WEIGHTS, "normalize_input": False}, False, ()),
        ({"state_dict": WEIGHTS, "normalize_input": True}, True, ()),
        ({"net": WEIGHTS, "args": {"normalise_inputs": 0}}, False, ()),
        (WEIGHTS | {"module.normalize_input": np.array(False)}, False, ()),
        ({"net": {"state_dict": WEIGHTS, "input_normalization": False}}, False, ()),
        ({"net": WEIGHTS, "mean": THREE, "std": (0.5, 0.5, 0.5)}, None, tuple(THREE)),
        ({"net": WEIGHTS, "args": NAMESPACE}, None, tuple(THREE)),
        ({"net": WEIGHTS, "hyper_parameters": ATTRIBUTES}, False, ()),
        # Figures of the run, settings that were not given, pixels of 0 to 255.
        ({"net": WEIGHTS, "results": {"mean": [0.5], "std": [0.1]}}, None, ()),
        ({"net": WEIGHTS, "args": {"mean": None, "std": None}}, None, ()),
        ({"net": WEIGHTS, "mean": [123, 116, 103], "std": [58, 57, 57]}, None, ()),
        ({"net": WEIGHTS, "mean": 0.5, "std": 0.5}, None, ()),
        ({"net": WEIGHTS, "normalize_input": "no"}, None, ()),
        # Often the data loader's, and not the network's.
        ({"net": WEIGHTS, "args": {"normalize": False}}, None, ()),
        ([WEIGHTS], None, ()),
    ],
)
def test_what_stands_beside_the_weights_is_read(tree, normalizes, mean):
    found = declared(tree, np.asarray)
    assert (found.normalizes, found.mean) == (normalizes, mean)
    if normalizes is not None:
        assert f"is {normalizes}" in found.origin
