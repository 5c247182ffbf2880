"""The report of a job, and how near samples are to real images."""

import io
import json

import numpy as np
import pytest
import tiny
from etils import epath
from rich.console import Console

from atebm_jax import UserError
from atebm_jax.evaluate import evaluation, pixel_scores, report


def test_table_has_a_row_a_stage_and_only_measured_columns():
    printed = io.StringIO()
    figures = {"step": 6, "clean_accuracy": 0.975, "robust_accuracy": 0.7}
    content = {
        "stages": {"stage1": figures, "stage2": figures | {"sample_distance": 0.5}},
        "real_test": {"sample_distance": 0.0514},
        "data": {"test": "digits:test"},
        "seed": 0,
        "notes": ["robust: how it was measured."],
    }
    report.show_stages(Console(file=printed, width=120), content)
    assert "0.9750" in printed.getvalue() and "agreement" not in printed.getvalue()
    assert "0.051" in printed.getvalue()
    assert "how it was measured" in printed.getvalue()


@pytest.mark.parametrize("name", tiny.NAMES)
def test_names_stand_in_tables_as_they_are(name):
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    content = {
        "stages": {name: {"step": 6, "clean_accuracy": 0.5}},
        "real_test": {},
        "data": {"test": f"folder:{name}"},
        "seed": 0,
        "notes": [f"images of {name}"],
    }
    report.show_stages(console, content)
    figures = {f"{name}/clean/auroc": {"value": 0.5}}
    report.show_figures(console, {"metrics": {"ood": {"figures": figures}}})
    shown = printed.getvalue()
    assert f"folder:{name}, seed 0" in shown and f"images of {name}" in shown
    assert f"{name} (6 steps)" in shown and f"{name}/clean/auroc" in shown


def test_weaker_augmentation_is_noted_of_a_stage_and_the_one_it_starts_from():
    config = tiny.config(**{"data.augment_gen": "", "data.augment_cls": "flip"})
    (note,) = evaluation.augmentation_notes(config, ["stage1", "stage2", "jem"])
    assert note.startswith("Stage 2 also sees") and "(none instead of flip)" in note
    assert "part of its gain over stage 1 comes from that" in note
    # Neither starts from the other.
    for others in (["jem", "ratio"], ["stage1", "jem"], ["stage2", "ratio"]):
        assert evaluation.augmentation_notes(config, others) == []
    config.data.augment_gen = "flip"
    assert evaluation.augmentation_notes(config, ["stage1", "stage2"]) == []


def test_report_is_read_as_it_was_written(tmp_path):
    workdir = epath.Path(tmp_path)
    assert report.read_stages(workdir) is None
    written = {"seed": 1, "stages": {}}
    report.write_stages(workdir, written)
    assert report.read_stages(workdir) == written
    assert json.loads((tmp_path / "report.json").read_text()) == written


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\udcff"])
def test_damaged_report_counts_as_none(tmp_path, text):
    (tmp_path / "report.json").write_bytes(text.encode(errors="surrogateescape"))
    assert report.read_stages(epath.Path(tmp_path)) is None


@pytest.fixture
def reference(digits):
    settings = type("Settings", (), {"pca_components": 16, "judge": "svc"})
    return pixel_scores.make_reference(*digits, settings)


def test_reference_of_one_class_is_told_by_the_field_that_took_it(digits):
    settings = type("Settings", (), {"num_reference": 2, "judge": "svc"})
    images, labels = digits
    with pytest.raises(UserError, match="num_reference is 2, which takes 2 .* judge"):
        pixel_scores.make_reference(images[:2], labels[:2] * 0, settings)


@pytest.fixture
def digits():
    from atebm_jax.data import materialise, open_source

    return materialise(open_source("digits:train"), "", (8, 8, 1), 400, 0)


def test_real_images_are_near_themselves_and_agree_with_their_labels(reference, digits):
    scores = pixel_scores.score(reference, *digits)
    assert scores["sample_distance"] == pytest.approx(0, abs=1e-6)
    assert scores["sample_agreement"] > 0.98
    noise = np.random.default_rng(0).random((50, 8, 8, 1), np.float32)
    assert pixel_scores.score(reference, noise, digits[1][:50])["sample_distance"] > 1


def test_broken_samples_are_infinitely_far(reference, digits):
    images = digits[0][:20].astype(np.float32) / 255
    images[3] = np.inf
    assert pixel_scores.score(reference, images, digits[1][:20])["sample_distance"] == (
        float("inf")
    )


def test_names_end_no_row_of_a_report():
    name = "folder:a|b\nc"
    test = {"source": name, "num_images": 1, "num_in_source": 1, "sha256": "0"}
    test |= {"image_shape": [8, 8, 1], "preprocess": ""}
    figures = {f"{name}/auroc": {"value": 0.5}}
    weights = {"path": name, "stage": "stage1", "step": 6}
    content = {
        "checkpoint": weights | {"averaged_weights_sha256": "0"},
        "data": {"test": test},
        "metrics": {"ood": {"figures": figures, "protocol": {"set": name}}},
        "versions": {},
        "seed": 0,
        "device": "1 x cpu",
        "notes": [name],
    }
    lines = report.markdown(content).splitlines()
    assert r"| folder:a&#124;b\nc/auroc | 0.5000 |  |  |" in lines
    assert r"- set: folder:a|b\nc" in lines and r"- folder:a|b\nc" in lines
    assert all(line[:1] in ("", "#", "-", "|") for line in lines)
