"""The models that are part of the package."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

import atebm_jax
from atebm_jax import UserError, data, job, local_path, model_names, trained
from atebm_jax.evaluate import report, suite
from atebm_jax.release.__main__ import main as release
from atebm_jax.sample.__main__ import main as sample

ZOO = Path(atebm_jax.__file__).parent / "zoo"


def figures(name, metric):
    folder = model_names.located(f"zoo:{name}") / "evaluation"
    return report.read_figures(folder)["metrics"][metric]["figures"]


def images_of(spec, shape, limit, data_dir=""):
    """Images of a data set, as a job's last evaluation takes them, and labels."""
    source = data.open_source(spec, data_dir)
    return data.materialise(source, "", shape, limit, 1)


# --- What is shipped ---


def test_shipped_models_are_small_whole_and_described():
    assert model_names.shipped() == ["cifar10", "digits"]
    files = [path for path in ZOO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4_000_000
    for name in model_names.shipped():
        loaded = trained.load(f"zoo:{name}")
        assert len(loaded.class_names) == 10 and loaded.config.data.data_dir == ""
        measured = report.read_figures(ZOO / name / "evaluation")["checkpoint"]
        assert measured["averaged_weights_sha256"] == loaded.fingerprint
        card = (ZOO / name / "README.md").read_text()
        assert 'license: "apache-2.0"' in card
        assert "- Command: `" in card and " # at commit " in card
        clean = figures(name, "accuracy")["clean_accuracy"]["value"]
        assert f"| clean_accuracy | {clean:.4f} |" in card


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


def test_cifar10_is_as_accurate_as_is_written(tfds_dir):
    model = atebm_jax.load("zoo:cifar10", batch_size=250)
    written = figures("cifar10", "accuracy")["clean_accuracy"]
    spec, shape, count = "tfds:cifar10:test", (32, 32, 3), written["count"]
    images, labels = images_of(spec, shape, count, tfds_dir)
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
    assert local_path.beside("hf:owner/name") == "hf_owner_name"
    assert local_path.beside("runs/zoo:digits") == "runs/zoo:digits"


def test_what_a_shipped_model_cannot_do_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="unknown model of the zoo 'cat': choose one"):
        atebm_jax.load("zoo:cat")
    with pytest.raises(UserError, match="zoo:digits is a release and best_by"):
        atebm_jax.load("zoo:digits", best_by="robust_accuracy")
    with pytest.raises(UserError, match="would be written to .*zoo/digits"):
        suite.evaluate("zoo:digits", ZOO / "digits")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["zoo:digits", "hf:owner/name"])
def test_nothing_is_written_to_a_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (
        lambda: job.run(tiny.config(), name),
        lambda: sample(["--workdir=zoo:digits", f"--out={name}"]),
        lambda: suite.evaluate("zoo:digits", f"{name}/evaluation"),
        lambda: release(["--workdir=zoo:digits", f"--out={name}"]),
    ):
        with pytest.raises(UserError, match=f"{name}.* is the name of a trained mod"):
            write()
    assert not list(tmp_path.iterdir())
