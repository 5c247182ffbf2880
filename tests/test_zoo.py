"""Models that are part of the package, and what makes such of a workdir."""

import json
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import atebm_jax
from atebm_jax import UserError, checksums, data, job, local_path, trained, zoo
from atebm_jax.convert import __main__ as convert
from atebm_jax.convert import exporting
from atebm_jax.evaluate import suite
from atebm_jax.evaluate.options import Options
from atebm_jax.sample.__main__ import main as sample

PACKAGE = Path(atebm_jax.__file__).parent
DATA = tiny.ROOT.parent / "shared" / "tfds"


def figures(name, metric):
    report = zoo.read_meta(zoo.reached(f"zoo:{name}"))["report"]
    return report["metrics"][metric]["figures"]


def images_of(spec, shape, limit):
    """Images of a data set, as a job's last evaluation takes them, and labels."""
    source = data.open_source(spec, str(DATA))
    return data.materialise(source, "", shape, limit, 1)


# --- What is shipped ---


def test_shipped_models_are_small_whole_and_described():
    assert zoo.names() == ["cifar10", "digits"]
    files = [path for path in (PACKAGE / "zoo").glob("*/*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4_000_000
    for name in zoo.names():
        folder = zoo.reached(f"zoo:{name}")
        assert checksums.exist(folder) and checksums.damage(folder) is None
        meta = zoo.read_meta(folder)
        assert meta["licence"] == "Apache-2.0" and len(meta["class_names"]) == 10
        assert meta["command"].partition(" # at commit ")[2]
        assert meta["config"]["data"]["data_dir"] == ""


def test_installation_has_their_files():
    project = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["atebm_jax"]
    packaged = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    for name in zoo.names():
        assert set((PACKAGE / "zoo" / name).iterdir()) <= packaged


def test_digits_are_as_accurate_as_is_written():
    model = atebm_jax.load("zoo:digits", batch_size=359)
    images, labels = images_of("digits:test", (8, 8, 1), 359)
    clean = model.classify(images).argmax(-1) == labels
    written = figures("digits", "accuracy")["clean_accuracy"]
    assert (len(images), clean.mean()) == (written["count"], written["value"])
    robust = clean & (model.classify(model.attack(images, labels)).argmax(-1) == labels)
    written = figures("digits", "pgd")["robust_accuracy_l2_0.5"]
    # Processors round differently: an image at the border may go over.
    assert abs(int(robust.sum()) - round(359 * written["value"])) <= 1


@pytest.mark.skipif(
    not (DATA / "cifar10").is_dir(), reason=f"CIFAR-10's test images are not in {DATA}"
)
def test_cifar10_is_as_accurate_as_is_written():
    model = atebm_jax.load("zoo:cifar10", batch_size=250)
    written = figures("cifar10", "accuracy")["clean_accuracy"]
    images, labels = images_of("tfds:cifar10:test", (32, 32, 3), written["count"])
    clean = model.classify(images).argmax(-1) == labels
    assert clean.mean() == written["value"]


def test_cifar10_brings_the_seeds_of_its_samples():
    model = atebm_jax.load("zoo:cifar10")
    starts = model.sample([3, 7], num_steps=0)
    gaussian = trained.load("zoo:cifar10").gaussian
    np.testing.assert_array_equal(
        starts, gaussian.batch(0, np.arange(2), np.array([3, 7]))
    )
    # As the images have it: not black, not grey, neighbours alike.
    draws = gaussian.batch(1, np.arange(300), np.zeros(300, int))
    assert draws.mean() == pytest.approx(0.473, abs=0.02)
    assert draws.std() == pytest.approx(0.25, abs=0.02)
    assert np.abs(np.diff(draws, axis=1)).mean() < 0.1


# --- Where they are read, and what they are not for ---


def test_samples_come_from_a_shipped_model(tmp_path):
    flags = ["--classes=3", "--count=2", "--num_steps=1", f"--out={tmp_path / 'out'}"]
    sample(["--workdir=zoo:digits", *flags])
    protocol = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert protocol["checkpoint"] == "zoo:digits" and protocol["seeds"] == "noise"


def test_what_goes_beside_a_workdir_goes_to_the_current_folder():
    assert local_path.beside("zoo:digits") == "zoo_digits"
    assert local_path.beside("runs/zoo:digits") == "runs/zoo:digits"


def test_what_a_shipped_model_cannot_do_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="unknown model of the zoo 'cat': choose one"):
        atebm_jax.load("zoo:cat")
    with pytest.raises(UserError, match="zoo:digits is one step and best_by"):
        atebm_jax.load("zoo:digits", best_by="robust_accuracy")
    for write in (
        lambda: job.run(tiny.config(), "zoo:digits"),
        lambda: sample(["--workdir=zoo:digits", "--out=zoo:digits"]),
        lambda: suite.evaluate("zoo:digits", "zoo:digits/evaluation"),
        lambda: convert.main(["--from=zoo:digits", "--export=zoo", "--to=zoo:digits"]),
    ):
        with pytest.raises(UserError, match="is a model of this package, where noth"):
            write()
    with pytest.raises(UserError, match="would be written to .*zoo/digits"):
        suite.evaluate("zoo:digits", zoo.reached("zoo:digits"))
    assert not list(tmp_path.iterdir())


# --- One of one's own ---


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A workdir of both stages with Gaussian seeds, and its light checkpoint."""
    folder = tmp_path_factory.mktemp("light")
    few = {"stage1.num_steps": 2, "stage2.num_steps": 2, "data.seeds": "gaussian"}
    with pytest.MonkeyPatch.context() as patch:
        tiny.only_the_loop(patch)
        tiny.run(tiny.config(**few), folder / "run")
    flags = [f"--from={folder / 'run'}", "--export=zoo", f"--to={folder / 'light'}"]
    convert.main([*flags, "--licence=CC0-1.0", "--command=mine"])
    return folder / "run", folder / "light"


def test_light_checkpoint_has_the_rounded_weights_and_all_that_is_read(exported):
    whole, light = map(trained.load, exported)
    for a, b in zip(*map(jax.tree.leaves, (whole.variables, light.variables))):
        assert b.dtype == np.float32
        np.testing.assert_array_equal(a.astype(np.float16), b)
    for name, array in whole.gaussian.arrays().items():
        rounded = array.astype(np.float16)
        np.testing.assert_array_equal(rounded, light.gaussian.arrays()[name])
    assert light.class_names == whole.class_names == tuple("0123456789")
    own = {"licence": "CC0-1.0", "command": "mine"}
    assert {name: light.meta[name] for name in own} == own
    assert light.meta["report"] is None


def test_figures_are_those_of_the_rounded_weights_alone(exported, tmp_path):
    whole, light = exported
    metrics, options = ("accuracy",), Options(num_examples=40)
    for folder in exported:
        out = tmp_path / folder.name
        suite.evaluate(folder, out, metrics=metrics, options=options)
    report = tmp_path / light.name / "report.json"
    exporting.to_zoo(str(whole), str(tmp_path / "with"), report=str(report))
    measured = trained.load(tmp_path / "with").meta["report"]
    assert measured["metrics"] == json.loads(report.read_text())["metrics"]
    for given, message in (
        (tmp_path / whole.name / "report.json", "of other weights than these in float"),
        (tmp_path / "nowhere", "is no report of an evaluation"),
    ):
        with pytest.raises(UserError, match=message):
            exporting.to_zoo(str(whole), str(tmp_path / "not"), report=str(given))
    assert not (tmp_path / "not").exists()


def test_stage_2_starts_from_a_light_checkpoint(exported, tmp_path, monkeypatch):
    tiny.only_the_loop(monkeypatch)
    few = {"stage2.num_steps": 2, "stage2.learning_rate": 1e-9}
    few["data.seeds"] = "gaussian"
    tiny.run(tiny.config(init_from=str(exported[1]), **few), tmp_path / "run")
    made, given = trained.load(tmp_path / "run"), trained.load(exported[1])
    assert made.meta["stage"] == "stage2" and made.class_names == given.class_names
    pairs = zip(*map(jax.tree.leaves, (made.variables, given.variables)), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_damage_and_numbers_beyond_float16_are_told(exported, tmp_path):
    weights = exported[1] / zoo.WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="weights.safetensors was truncated or altered"):
        atebm_jax.load(exported[1])
    weights.write_bytes(content)
    large = {"params": {"a": np.full(2, 1e6, np.float32)}}
    with pytest.raises(UserError, match="params/a has numbers beyond float16's 65504"):
        zoo.rounded(large)
    with pytest.raises(UserError, match="is there already: give a new folder"):
        exporting.to_zoo(str(exported[0]), str(tmp_path))
    with pytest.raises(UserError, match="--licence belongs to --export=zoo"):
        convert.main(["--from=a", "--to=b", "--licence=CC0-1.0"])
