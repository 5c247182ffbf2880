"""Configs: overrides, checks and comparison."""

import importlib.util
import sys
from pathlib import Path

import flax.linen as nn
import pytest
from absl import flags
from absl.testing import flagsaver
from ml_collections import ConfigDict

from atebm_jax import (
    UserError,
    archs,
    checkpoint,
    command_line,
    config,
    curriculum,
    data,
    main,
    models,
)
from atebm_jax.models.family import Family
from atebm_jax.train import plan_stage

CONFIGS = Path(__file__).parents[1] / "configs"

METHODS = ("dat", "at", "jem", "ratio", "dat_one_stage", "dat_batchnorm")
METHODS += ("dat_clean", "dat_r1", "dat_fixed_t")
ROWS = [
    *(f"digits.py:{row}" for row in METHODS),
    *(f"cifar10.py:{row}" for row in METHODS),
    "cifar10.py:wrn34_10_t40",
    "cifar10.py:wrn34_10_t50",
    "cifar10.py:dm_wrn28_10",
    "cifar10.py:small",
    "cifar10.py:cpu",
    "cifar10.py:hour",
    "cifar10.py:noise",
    "cifar100.py:wrn34_10_t45",
    "cifar100.py:wrn34_10_t50",
    "cifar100.py:small",
    "imagenet256.py:resnet50_t15",
    "imagenet256.py:resnet50_t30",
    "imagenet256.py:wrn50_4_t30",
    "imagenet256.py:wrn50_4_t65",
    "imagenet256.py:convnext_large_t110",
    "imagenet256.py:convnext_base",
    "imagenet256.py:convnext_small",
    "imagenet256.py:convnext_tiny",
    "imagenet256.py:xcit_s12",
    "imagenet256.py:swin_b",
    "imagenet256.py:smoke",
]


def load(row: str) -> ConfigDict:
    return command_line.load_config(str(CONFIGS / row))


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_accepted_by_every_room(row):
    settings = load(row)
    config.check(settings)
    model = models.build(settings.model)
    for name in ("stage1", "stage2", *config.stages_to_run(settings)):
        plan_stage(settings, name, model, config.num_steps(settings[name], 50_000))
    for field, value in settings.data.items():
        if field.startswith(("augment_", "preprocess")):
            data.parse(value)


def test_all_rows_of_all_files_are_tested():
    found = []
    for path in sorted(CONFIGS.glob("*.py")):
        spec = importlib.util.spec_from_file_location("rows", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        rows = getattr(module, "ROWS", None)
        found += [f"{path.name}:{row}" for row in rows] if rows else [path.name]
    assert sorted(found) == sorted(ROWS)


def test_cifar_rows_carry_the_values_of_the_paper():
    ten, hundred = (load(f"cifar{n}.py:wrn34_10_t50") for n in (10, 100))
    assert (ten.stage2.learning_rate, hundred.stage2.learning_rate) == (1e-3, 1e-2)
    assert (ten.stage2.auc_threshold, hundred.stage2.auc_threshold) == (0.7, 0.75)
    shorter = load("cifar10.py:wrn34_10_t40")
    assert (ten.stage2.t_max, shorter.stage2.t_max) == (100, 50)
    for settings in (ten, hundred):
        for stage in (settings.stage1, settings.stage2):
            assert (stage.batch_size, stage.weight_decay) == (128, 5e-4)
            assert (stage.optimizer, stage.average_decay) == ("sgd", 0.999)
            attack = stage.adversary
            assert (attack.norm, attack.epsilon) == ("l2", 0.5)
            assert (attack.step_size, attack.num_steps) == (0.1, 10)
        assert settings.stage1.num_epochs == 300
        assert settings.stage1.schedule == "cosine"
        assert settings.stage2.schedule == "constant"
        assert settings.stage2.contrastive_step_size == 0.1
        assert curriculum.window_length(settings.stage2.auc_window_images, 128) == 8


def test_imagenet_rows_carry_the_values_of_the_paper():
    def row(name):
        return load(f"imagenet256.py:{name}")

    large = row("convnext_large_t110")
    assert (large.stage2.optimizer, large.stage2.learning_rate) == ("adamw", 3e-4)
    assert (large.stage2.weight_decay, large.stage2.contrastive_step_size) == (
        0.05,
        3.0,
    )
    assert large.model.stem == "conv" and not large.model.mean
    # Network, T_max, threshold and sampling steps of each row.
    expected = {
        "resnet50_t15": ("resnet50", 15, 0.4, 14),
        "resnet50_t30": ("resnet50", 30, 0.4, 14),
        "wrn50_4_t30": ("wide_resnet50_4", 30, 0.2, 17),
        "wrn50_4_t65": ("wide_resnet50_4", 65, 0.2, 19),
        "convnext_large_t110": ("convnext_large_cvst", 110, 0.2, 36),
    }
    for name, values in expected.items():
        settings = row(name)
        stage = settings.stage2
        arch = archs.name_of(settings.model)
        steps = settings.evaluate.samples.num_steps
        assert (arch, stage.t_max, stage.auc_threshold, steps) == values
        assert stage.batch_size == 512 and settings.stages == "stage2"
        attack = stage.adversary
        assert (attack.norm, attack.epsilon) == ("l2", 3.0)
        assert (attack.step_size, attack.num_steps) == (2.0, 3)
        if "convnext" not in name:
            assert (stage.optimizer, stage.learning_rate) == ("sgd", 1e-3)
            assert (stage.weight_decay, stage.contrastive_step_size) == (5e-4, 2.0)
        assert settings.evaluate.samples.step_size == 8.0
        assert settings.data.preprocess == "resize(292,bicubic)|center_crop(256)"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("stage2.auc_treshold", "0.7", "stage2.auc_threshold"),
        ("auc_threshold", "0.7", "stage2.auc_threshold"),
        ("stage2", "1", "group of fields"),
        ("stage2.t_max", "7.5", "no int"),
        ("stage2.auc_threshold", "high", "no float"),
        ("data.image_shape", "8", "no tuple"),
        ("stage2.log_r1", "maybe", "no bool"),
    ],
)
def test_misspelt_or_ill_typed_override_names_the_remedy(field, value, message):
    with pytest.raises(UserError, match=message):
        config.check_override(config.default(), field, value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stage2.t_max", "7"),
        ("stage2.auc_threshold", "1"),
        ("stage2.auc_threshold", "1e-3"),
        ("data.image_shape", "(8, 8, 1)"),
        ("stage2.log_r1", "true"),
        ("data.train", "folder:x"),
    ],
)
def test_fitting_override_is_taken(field, value):
    config.check_override(config.default(), field, value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("stages", "stage3", "choose auto"),
        ("seed", -1, "seed"),
        ("data.image_shape", (8, 8), "image_shape"),
        ("data.train", "", "data.train"),
        ("stage1.num_steps", 0, "budget"),
        ("ratio.ood_adversary.num_steps", -3, "config.ratio.ood_adversary.num_steps"),
        ("evaluate.attack.num_steps", -1, "config.evaluate.attack.num_steps is -1"),
        ("stage1.num_epochs", 1.0, "budget"),
        ("stage1.learning_rate", 0.0, "positive"),
        ("stage1.average_decay", 1.0, "average_decay"),
        ("stage2.t_max", -1, "t_max"),
        ("stage2.auc_threshold", 1.5, "AUC"),
        ("evaluate.samples.num", 1, "samples.num"),
        ("seed", 2**31, "below"),
        ("stage1.batch_size", 0, "stage1.batch_size"),
        ("stage1.num_epochs", float("inf"), "finite"),
        ("stage2.weight_ce", float("nan"), "finite"),
        ("stage2.contrastive_step_size", -0.3, "positive"),
        ("stage1.adversary.step_size", 0.0, "positive"),
        ("data.image_shape", (8.0, 8, 1), "image_shape"),
        ("data.image_shape", ("a", 8, 1), "must be numbers"),
        ("stage1.decay_at", ("a",), "must be numbers"),
        ("model.std", (0.5,), "give both"),
    ],
)
def test_impossible_value_is_refused_by_name(field, value, message):
    settings = load("digits.py")
    settings.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        config.check(settings)


def test_steps_follow_from_epochs_or_are_given():
    stage = config.default().stage1
    stage.num_epochs = 2.0
    assert config.num_steps(stage, 1280) == 20
    stage.num_epochs, stage.num_steps = 0.0, 7
    assert config.num_steps(stage, 1280) == 7


def test_comparison_names_fields_and_leaves_run_control_out():
    old, new = config.default(), config.default()
    new.stages, new.data.num_workers, new.stage2.t_max = "stage1", 3, 51
    assert config.differences(old.to_dict(), new.to_dict()) == [
        "stage2.t_max: 50 before, 51 now"
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.py", "no config file"),
        ("cifar10.py:smal", "Did you mean 'small'"),
        ("digits.py:row", "unknown row 'row'"),
        ("../tests/small.py:row", "no rows"),
    ],
)
def test_config_file_that_cannot_be_loaded_is_explained(path, message):
    with pytest.raises(UserError, match=message):
        load(path)


def test_command_line_overrides_reach_the_config(monkeypatch):
    path = str(CONFIGS / "cifar10.py")
    arguments = ["main", f"--config={path}:small", "--workdir=x"]
    arguments += ["--config.stage2.t_max=7", "--config.data.image_shape=(64,64,3)"]
    # ml_collections reads the overrides from sys.argv itself.
    monkeypatch.setattr(sys, "argv", arguments)
    with flagsaver.flagsaver():
        main._parse(arguments)
        settings = flags.FLAGS.config
    assert settings.stage2.t_max == 7
    assert tuple(settings.data.image_shape) == (64, 64, 3)
    assert settings.model.depth == 16


DEFAULT = """
from atebm_jax import config

def get_config():
  made = config.default()
"""


@pytest.mark.parametrize(
    ("text", "row", "message"),
    [
        ("nothing.here", "", "NameError"),
        ("import sys; sys.exit(0)", "", "cannot be run: SystemExit"),
        ("get_config = 3", "", "has no function get_config"),
        ("def get_config():\n  pass", "", "returns a NoneType: expected atebm_jax.con"),
        ("def get_config():\n  return {'seed': 1}", "", "returns a dict"),
        ("def get_config(row):\n  pass", "", "cannot be run: TypeError: .*'row'"),
        ("def get_config(row=''):\n  return {}[row]", ":b", "cannot be run: KeyError"),
        (
            f"{DEFAULT}  made.stage1.batchsize = 8\n  return made",
            "",
            "sets stage1.batchsize, which nothing reads: .* stage1.batch_size",
        ),
        (
            f"{DEFAULT}  made.model.dept = 16\n  return made",
            "",
            "sets model.dept, which nothing reads: .* model.depth",
        ),
        (
            f"{DEFAULT}  made.data.image_shape = 32\n  return made",
            "",
            "TypeError: .*image_shape",
        ),
    ],
)
def test_config_file_that_cannot_be_run_is_explained(tmp_path, text, row, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        command_line.load_config(f"{path}{row}")


class Scratch(nn.Module):
    """A network of this package, as far as the config is concerned."""

    width: int
    num_classes: int


def add_scratch(monkeypatch, **fields):
    """As by its file in `models/` and its line of `models/families.py`."""
    family = Family(
        build=lambda model: Scratch(model.width, model.num_classes),
        sized_by=tuple(fields),
        fields=fields,
    )
    monkeypatch.setitem(models.FAMILIES, "scratch", family)
    monkeypatch.setattr(command_line, "BUILT_IN", frozenset(models.FAMILIES))


def test_field_of_a_new_family_needs_nothing_but_its_declaration(monkeypatch, tmp_path):
    add_scratch(monkeypatch, width=32)
    file = tmp_path / "mine.py"
    file.write_text(f"{DEFAULT}  made.model.name = 'scratch'\n  return made")
    assert models.build(command_line.load_config(str(file)).model) == Scratch(32, 10)
    file.write_text(f"{DEFAULT}  made.model.width = 8\n  return made")
    made = command_line.load_config(str(file))
    config.check_complete(made)
    assert made.model.width == 8
    flag = "--config.model.width=16"
    assert flag in command_line.checked_arguments([f"--config={file}", flag])
    with pytest.raises(UserError, match="width=wide is no int"):
        command_line.checked_arguments(
            [f"--config={file}", "--config.model.width=wide"]
        )
    monkeypatch.setitem(archs.ARCHS, "scratch16", {"name": "scratch", "width": 16})
    model = archs.model_config("scratch16", num_classes=4)
    assert models.build(model) == Scratch(16, 4)
    assert archs.describe(model) == "scratch-16"
    stored = config.complete({"model": {"name": "scratch"}})
    assert stored["model"]["width"] == 32


@pytest.mark.parametrize("value", [35, 34.0, "34"])
def test_family_whose_default_is_not_that_of_the_others_is_refused(monkeypatch, value):
    add_scratch(monkeypatch, depth=value)
    with pytest.raises(UserError, match=f"'scratch' .*depth .*{value!r}, .*has 34 alr"):
        config.default()


def test_config_that_lacks_a_field_or_has_another_kind_of_one_is_told():
    for change, message in (
        (lambda made: made.__delitem__("stages"), "no field stages: start from"),
        (lambda made: made.stage2.__delitem__("t_max"), "no field stage2.t_max"),
        (lambda made: made.__setitem__("model", None), "no field model.activation"),
        (lambda made: made.data.update(image_shape=None), "image_shape is None: expec"),
        (lambda made: made.stage1.update(num_steps=2.5), "num_steps is 2.5: expected"),
    ):
        made = config.default()
        with made.unlocked(), made.ignore_type():
            change(made)
        with pytest.raises(UserError, match=message):
            config.check(made)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--workdir=x"],
        ["--config=configs/nowhere.py", "--workdir=x"],
        ["--config={digits}"],
        ["--config={digits}", "--workdir=x", "--config.stage2.t_maxx=3"],
        ["--config={digits}", "--workdir=x", "--workdirr=3"],
        ["--config={digits}", "--workdir=x", "--noconfig.stage2.log_r2"],
        ["--config={digits}", "--workdir=x", "surplus"],
    ],
)
def test_user_mistake_on_the_command_line_exits_with_2(arguments, capsys):
    filled = [a.format(digits=CONFIGS / "digits.py") for a in arguments]
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as leaving:
        flags.FLAGS.unparse_flags()
        main._parse(["main", *filled])
    assert leaving.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") <= 2


def test_config_of_an_earlier_version_gets_the_defaults_of_later_fields():
    stored = checkpoint.as_json(config.default())
    whole = config.complete(stored)
    assert config.differences(whole, stored) == []
    del stored["model"]["remat"], stored["evaluate"], stored["data"]["image_shape"]
    stored["model"]["depth"] = 16
    made = config.complete(stored)
    assert config.differences(whole, made) == ["model.depth: 34 before, 16 now"]
    assert "remat" not in stored["model"]


def test_field_that_only_earlier_versions_had_does_not_matter():
    stored = checkpoint.as_json(config.default())
    stored["model"]["conv_gradient"] = "auto"
    now = checkpoint.as_json(config.default())
    assert config.differences(config.complete(stored), now) == []
    models.build(ConfigDict(config.complete(stored)).model)
