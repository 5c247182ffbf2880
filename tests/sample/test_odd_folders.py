"""Whole commands in folders whose names are patterns, flags, formats or no text."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from atebm_jax import UserError, checkpoint, data
from atebm_jax.convert import __main__ as convert
from atebm_jax.sample import __main__ as sample

# Beside each lies a folder that its last part means as a pattern.
ODD = {"%s #1/a {b,c}/*/[lab]": "l", "-x/%20 $HOME/[bold] ü/tea\nroom/?": "q"}
EVERY = pytest.mark.parametrize("odd", ODD)
# What Python makes of the bytes b"caf\xe9".
LATIN = os.fsdecode(b"caf\xe9")
# Weights go out under a family's names in PyTorch, which the small network has not.
SETTINGS = {
    "stages": "stage1",
    "stage1.num_steps": 4,
    "model.name": "wide_resnet",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A finished job, images, a mask, and what every command makes of them."""
    here = os.getcwd()
    root = tmp_path_factory.mktemp("plain")
    os.chdir(root)
    folder = root / "plain"
    tiny.run(tiny.config(**SETTINGS), folder / "run")
    (folder / "images").mkdir()
    images, _ = data.materialise(data.open_source("digits:test"), "", (8, 8, 1))
    for number in range(3):
        name = folder / "images" / f"{number} {{a}}[b]%s.png"
        Image.fromarray(images[number, ..., 0]).save(name)
    mask = np.zeros((8, 8), np.uint8)
    mask[4:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    yield folder
    os.chdir(here)


@pytest.fixture(scope="module")
def expected(plain):
    os.chdir(plain.parent)
    run_samples("plain")
    run_evaluation("plain")
    return plain


@pytest.fixture
def odd_folder(odd, plain, tmp_path, monkeypatch):
    """A copy below such a path, as seen from the working directory, and a decoy."""
    for name in (odd, os.path.join(os.path.dirname(odd), ODD.get(odd, "decoy"))):
        for part in ("run", "images"):
            shutil.copytree(plain / part, tmp_path / name / part)
        shutil.copy(plain / "mask.png", tmp_path / name)
        shutil.rmtree(tmp_path / name / "run" / "evaluation", ignore_errors=True)
    # Read in place of the images, it would be another set.
    (tmp_path / name / "images" / "0 {a}[b]%s.png").unlink()
    monkeypatch.chdir(tmp_path)
    return odd


def run_samples(folder, workdir=None):
    """Samples, explanations and edits below a folder, from images below it."""
    common = [f"--workdir={workdir or f'{folder}/run'}", "--num_steps=2"]
    sample.main(
        [
            *(*common, f"--out={folder}/samples", "--count=3"),
            f"--seeds=folder:{folder}/images",
        ]
    )
    explain = ["explain", *common, f"--out={folder}/why", "--target=1", "--index=1:3"]
    sample.main([*explain, "--", f"{folder}/images"])
    edit = ["edit", *common, f"--out={folder}/edits", "--task=inpaint"]
    edit += [f"--mask={folder}/mask.png", "--index=0"]
    edit += [f"--reference={folder}/images/0 {{a}}[b]%s.png"]
    sample.main([*edit, "--", f"{folder}/images"])


def run_evaluation(folder):
    metrics = "--metrics=accuracy,calibration"
    tiny.evaluate(f"--workdir={folder}/run", metrics, "--num_examples=40")


def assert_same_files(folder, expected):
    """The same files with the same bytes; of JSON all but what names a path."""
    made, known = (
        {path.relative_to(root): path for path in root.rglob("*") if path.is_file()}
        for root in (folder, expected)
    )
    assert made.keys() == known.keys() and made
    for name, path in made.items():
        if name.suffix == ".json":
            made_json, known_json = (
                json.loads(p.read_text()) for p in (path, known[name])
            )
            for content in (made_json, known_json):
                for key in ("checkpoint", "seeds"):
                    content.pop(key, None)
                for result in content.get("results", []):
                    result.pop("origin")
            assert made_json == known_json, name
        else:
            assert path.read_bytes() == known[name].read_bytes(), name


@pytest.mark.jobs
@EVERY
def test_samples_explanations_and_edits_are_those_of_any_folder(
    odd, odd_folder, expected, tmp_path
):
    run_samples(odd_folder)
    for name in ("samples", "why", "edits"):
        assert_same_files(tmp_path / odd / name, expected / name)
    content = json.loads((tmp_path / odd / "samples" / "samples.json").read_text())
    assert content["seeds"] == f"folder:{odd}/images"
    # The same commands find everything done.
    run_samples(odd_folder)
    assert sorted(os.listdir(tmp_path)) == [odd.partition("/")[0]]


@EVERY
def test_evaluation_is_that_of_any_folder(odd, odd_folder, expected, tmp_path):
    run_evaluation(odd_folder)
    made, known = (
        json.loads((root / "run" / "evaluation" / "report.json").read_text())
        for root in (tmp_path / odd, expected)
    )
    assert made["metrics"].keys() == known["metrics"].keys()
    for name, metric in made["metrics"].items():
        assert metric["figures"] == known["metrics"][name]["figures"]
    assert sorted(os.listdir(tmp_path)) == [odd.partition("/")[0]]


@EVERY
def test_job_goes_on_to_the_same_end(odd, odd_folder, plain, tmp_path):
    run = tmp_path / odd / "run"
    shutil.rmtree(run / "checkpoints" / "stage1" / "4")
    (run / "report.json").unlink()
    tiny.run(tiny.config(**SETTINGS), f"{odd_folder}/run")
    made, known = (checkpoint.load_weights(f) for f in (run, plain / "run"))
    assert made[1]["step"] == 4
    jax.tree.map(np.testing.assert_array_equal, made[0], known[0])
    for name in ("report.json", "config.json"):
        made, known = (json.loads((f / name).read_text()) for f in (run, plain / "run"))
        assert made == known, name
    assert sorted(os.listdir(tmp_path)) == [odd.partition("/")[0]]


@EVERY
def test_weights_go_out_and_come_in_again(odd, odd_folder, plain, tmp_path):
    file, folder = f"{odd_folder}/w.safetensors", f"{odd_folder}/imported"
    convert.main([f"--from={odd_folder}/run", "--export=safetensors", f"--to={file}"])
    convert.main([f"--from={file}", "--image_size=8", f"--to={folder}"])
    made, known = (checkpoint.load_weights(f) for f in (folder, plain / "run"))
    jax.tree.map(np.testing.assert_array_equal, made[0], known[0])
    assert sorted(os.listdir(tmp_path)) == [odd.partition("/")[0]]


@pytest.mark.parametrize("odd", [f"{LATIN}/x"])
def test_only_what_libraries_open_needs_a_name_in_utf8(
    odd, odd_folder, plain, expected, tmp_path, capsys
):
    """Checkpoints need one; images, results and reports do not."""
    run_samples(odd_folder, workdir=plain / "run")
    for name in ("samples", "why", "edits"):
        assert_same_files(tmp_path / odd / name, expected / name)
    with pytest.raises(UserError, match=r"caf\\xe9.* has bytes in its name"):
        run_samples(odd_folder)
    for command in (
        [f"--from={odd_folder}/run", "--export=safetensors", "--to=w.safetensors"],
        [f"--from={plain}/mask.png", f"--to={odd_folder}/imported"],
    ):
        with pytest.raises(UserError, match=r"caf\\xe9.* has bytes in its name"):
            convert.main(command)
    with pytest.raises(SystemExit) as stopped:
        run_evaluation(odd_folder)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
