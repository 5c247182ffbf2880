"""The metrics of a job on disk."""

import logging
import time

import numpy as np
from etils import epath

from atebm_jax import command_line
from atebm_jax.metric_writer import MetricWriter, read_metrics


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


def test_broken_figures_stay_readable_without_a_word_from_a_library(tmp_path, caplog):
    loggers = [logging.getLogger(name) for name in ("", "absl", "tensorboardX")]
    before = [logger.level for logger in loggers]
    try:
        command_line.quiet_libraries()
        workdir = epath.Path(tmp_path)
        write_steps(workdir, [1], gradient_norm=float("nan"))
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
    assert np.isnan(read_metrics(workdir)[0]["gradient_norm"])
    assert not caplog.records


def test_foreign_lines_among_the_metrics_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'5\n\xff\n{"loss": 1}\n{"stage": "stage1", "step": 1}\n'
    )
    assert read_metrics(epath.Path(tmp_path)) == [{"stage": "stage1", "step": 1}]


def test_events_of_two_beginnings_in_one_second_are_all_kept(tmp_path, monkeypatch):
    """A rollback, or a start that finishes an evaluation, begins a file anew."""
    monkeypatch.setattr(time, "time", lambda: 1.7e9)
    writer = MetricWriter(epath.Path(tmp_path))
    for first in (0, 3):
        writer.rewind("stage1", first)
        writer.write("stage1", first + 1, {"loss": 1.0})
    writer.close()
    assert len(list((tmp_path / "events" / "stage1").iterdir())) == 2
