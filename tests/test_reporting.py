"""What a job shows and writes on the way."""

import io
import json
import os
import re
import time
import warnings

import numpy as np
import pytest
from etils import epath
from rich.console import Console

from atebm_jax import UserError
from atebm_jax.evaluate import figures, plots, report, samples, suite_report
from atebm_jax.evaluate.progress import progress
from atebm_jax.reporting import (
    MetricWriter,
    ProgressLine,
    is_device,
    read_metrics,
    replace_text,
    say,
)

METRICS = {
    "T": 3.0,
    "auc": 0.812,
    "loss_ce": 1.5,
    "loss_bce": 0.25,
    "images_per_second": 640.0,
}


def write_steps(workdir, steps, **metrics):
    writer = MetricWriter(workdir)
    writer.rewind("stage1", steps[0] - 1)
    for step in steps:
        writer.write("stage1", step, {"loss": float(step), **metrics})
    writer.close()


def test_steps_stand_once_after_a_resume(tmp_path):
    workdir = epath.Path(tmp_path)
    write_steps(workdir, [1, 2, 3])
    write_steps(workdir, [3, 4], resumed=1.0)
    assert [r["step"] for r in read_metrics(workdir)] == [1, 2, 3, 4]
    assert "resumed" in read_metrics(workdir)[2]


def test_line_cut_off_by_a_kill_is_left_out(tmp_path):
    workdir = epath.Path(tmp_path)
    write_steps(workdir, [1, 2])
    path = workdir / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    assert [r["step"] for r in read_metrics(workdir)] == [1]
    write_steps(workdir, [2])
    assert [r["step"] for r in read_metrics(workdir)] == [1, 2]


def test_broken_figures_stay_readable(tmp_path):
    workdir = epath.Path(tmp_path)
    write_steps(workdir, [1], gradient_norm=float("nan"))
    assert np.isnan(read_metrics(workdir)[0]["gradient_norm"])


def test_text_is_replaced_whole(tmp_path):
    path = epath.Path(tmp_path) / "report.json"
    replace_text(path, "old")
    replace_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_stage_step_t_auc_losses_and_speed(terminal):
    printed = io.StringIO()
    console = Console(file=printed, width=160, force_terminal=terminal)
    line = ProgressLine(console, "stage2", 0, 100)
    line.show(40, METRICS)
    line.close()
    shown = printed.getvalue()
    for part in ("stage2", "40/100", "T 3", "AUC 0.81", "CE 1.500", "BCE 0.250"):
        assert part in shown
    assert "640 img/s" in shown


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
    report.show(Console(file=printed, width=120), content)
    assert "0.9750" in printed.getvalue() and "agreement" not in printed.getvalue()
    assert "0.051" in printed.getvalue()
    assert "how it was measured" in printed.getvalue()


# Fine names of folders, which rich would take for styles, faults or a picture.
NAMES = ("[bold]a", "a [/x]", "[link=x]a[/link]", "a:smile:b", "[red]")


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(name, terminal):
    printed = io.StringIO()
    console = Console(file=printed, width=200, force_terminal=terminal)
    say(console, f"it is in {name}")
    line = ProgressLine(console, name, 0, 9)
    line.show(3, METRICS)
    line.note(f"moved {name}")
    line.close()
    with progress(console) as show:
        show(f"scores of {name}", 1, 2)
    shown = without_styles(printed.getvalue())
    for words in (f"it is in {name}", f"moved {name}", f"scores of {name}"):
        assert words in shown
    assert f"{name} step 3/9" in shown or f"{name} " in shown


@pytest.mark.parametrize("name", NAMES)
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
    report.show(console, content)
    figures = {f"{name}/clean/auroc": {"value": 0.5}}
    suite_report.show(console, {"metrics": {"ood": {"figures": figures}}})
    shown = printed.getvalue()
    assert f"folder:{name}, seed 0" in shown and f"images of {name}" in shown
    assert f"{name} (6 steps)" in shown and f"{name}/clean/auroc" in shown


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
    lines = suite_report.markdown(content).splitlines()
    assert r"| folder:a&#124;b\nc/auroc | 0.5000 |  |  |" in lines
    assert r"- set: folder:a|b\nc" in lines and r"- folder:a|b\nc" in lines
    assert all(line[:1] in ("", "#", "-", "|") for line in lines)


def without_styles(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_names_in_plots_are_no_formulas(tmp_path):
    path = epath.Path(tmp_path) / "grid.png"
    samples_of_all = {r"$\frac$": (np.zeros((2, 8, 8, 1)), np.arange(2))}
    names = [r"$\x$", r"$y_1$"]
    plots.sample_grid(
        path, samples_of_all, num_classes=2, num_rows=1, class_names=names
    )
    assert path.read_bytes().startswith(b"\x89PNG")


def test_report_is_read_as_it_was_written(tmp_path):
    workdir = epath.Path(tmp_path)
    assert report.read(workdir) is None
    written = {"seed": 1, "stages": {}}
    report.write(workdir, written)
    assert report.read(workdir) == written
    assert json.loads((tmp_path / "report.json").read_text()) == written


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\udcff"])
def test_damaged_report_counts_as_none(tmp_path, text):
    (tmp_path / "report.json").write_bytes(text.encode(errors="surrogateescape"))
    assert report.read(epath.Path(tmp_path)) is None


def test_foreign_lines_among_the_metrics_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'5\n\xff\n{"loss": 1}\n{"stage": "stage1", "step": 1}\n'
    )
    assert read_metrics(epath.Path(tmp_path)) == [{"stage": "stage1", "step": 1}]


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_is_drawn_for_grey_and_colour_and_for_broken_images(tmp_path, channels):
    images = np.random.default_rng(0).random((6, 8, 8, channels))
    images[2] = np.nan
    labels = np.arange(6) % 3
    path = epath.Path(tmp_path) / "grid.png"
    plots.sample_grid(path, {"a": (images, labels)}, num_classes=3, num_rows=2)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_names_of_classes_are_drawn_as_they_are(tmp_path):
    names = ["caf\udce9", "$a_{$", "\u6f22 50 % \\ ^"]
    images, labels = np.zeros((3, 8, 8, 1)), np.arange(3)
    path = epath.Path(tmp_path) / "grid.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.sample_grid(
            path,
            {"a": (images, labels)},
            num_classes=3,
            num_rows=1,
            class_names=names,
        )
        figures.strips(path, {"a": images}, names)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_names_that_are_no_utf8_are_escaped_in_reports(tmp_path):
    replace_text(epath.Path(tmp_path) / "report.md", "caf\udce9, caf\u00e9")
    text = (tmp_path / "report.md").read_bytes().decode()
    assert text == "caf\\xe9, caf\u00e9"
    # A stream of a notebook takes no surrogates, and has no other way for them.
    with (tmp_path / "printed").open("w", encoding="utf-8") as file:
        say(Console(file=file, width=200), "in caf\udce9")
    assert (tmp_path / "printed").read_text() == "in caf\\xe9\n"


def test_pipe_is_written_through_and_stays(tmp_path):
    """As /dev/null and /dev/stdout, which a file must not take the place of."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    replace_text(epath.Path(pipe), "figures")
    assert os.read(reader, 99) == b"figures"
    os.close(reader)
    assert is_device(pipe) and os.listdir(tmp_path) == ["pipe"]


def test_events_of_two_beginnings_in_one_second_are_all_kept(tmp_path, monkeypatch):
    """A rollback, or a start that finishes an evaluation, begins a file anew."""
    monkeypatch.setattr(time, "time", lambda: 1.7e9)
    writer = MetricWriter(epath.Path(tmp_path))
    for first in (0, 3):
        writer.rewind("stage1", first)
        writer.write("stage1", first + 1, {"loss": 1.0})
    writer.close()
    assert len(list((tmp_path / "events" / "stage1").iterdir())) == 2


def test_curves_are_drawn_from_one_stage_alone(tmp_path):
    path = epath.Path(tmp_path) / "curves.png"
    plots.training_curves(path, [{"stage": "stage2", "step": 5, "loss_ce": 1.0}])
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def reference(digits):
    settings = type("Settings", (), {"pca_components": 16, "judge": "svc"})
    return samples.make_reference(*digits, settings)


def test_reference_of_one_class_is_told_by_the_field_that_took_it(digits):
    settings = type("Settings", (), {"num_reference": 2, "judge": "svc"})
    images, labels = digits
    with pytest.raises(UserError, match="num_reference is 2, which takes 2 .* judge"):
        samples.make_reference(images[:2], labels[:2] * 0, settings)


@pytest.fixture
def digits():
    from atebm_jax.data import materialise, open_source

    return materialise(open_source("digits:train"), "", (8, 8, 1), 400, 0)


def test_real_images_are_near_themselves_and_agree_with_their_labels(reference, digits):
    scores = samples.score(reference, *digits)
    assert scores["sample_distance"] == pytest.approx(0, abs=1e-6)
    assert scores["sample_agreement"] > 0.98
    noise = np.random.default_rng(0).random((50, 8, 8, 1), np.float32)
    assert samples.score(reference, noise, digits[1][:50])["sample_distance"] > 1


def test_broken_samples_are_infinitely_far(reference, digits):
    images = digits[0][:20].astype(np.float32) / 255
    images[3] = np.inf
    assert samples.score(reference, images, digits[1][:20])["sample_distance"] == (
        float("inf")
    )
