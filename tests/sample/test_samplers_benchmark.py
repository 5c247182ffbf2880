"""The comparison of samplers runs, and tells mistakes."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from atebm_jax import UserError


@pytest.fixture
def compare(monkeypatch):
    """The script's main function; it stands beside what it imports."""
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("samplers").main
    for name in ("samplers", "options"):
        sys.modules.pop(name, None)


def test_comparison_writes_table_scores_and_plot(workdir, tmp_path, compare, capsys):
    files = [f"--json={tmp_path / 'a.json'}", f"--png={tmp_path / 'a.png'}"]
    settings = ["--setting=pgd:0.3", "--setting=pgd:0.3:cosine"]
    sizes = ["--evaluations=1,3", "--num=40", "--seeds=0,1"]
    compare([f"--workdir={workdir}", *settings, *sizes, *files])
    record = json.loads((tmp_path / "a.json").read_text())
    assert list(record["scores"]) == ["pgd:0.3:constant", "pgd:0.3:cosine"]
    first = record["scores"]["pgd:0.3:constant"]
    assert list(first) == ["1", "3"] and len(first["3"]) == 2
    qualities = {"sample_distance", "feature_distance", "sample_agreement"}
    assert set(first["3"][0]) == set(record["real_test"]) == qualities
    # One step has no room for a schedule.
    assert first["1"] == record["scores"]["pgd:0.3:cosine"]["1"]
    assert "pgd:0.3:cosine" in capsys.readouterr().out
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--setting=pgd", "expected SAMPLER:STEP_SIZE"),
        ("--setting=hmc:1", "unknown sampler"),
        ("--setting=pgd:1:step", "unknown schedule"),
        ("--evaluations=few", "whole numbers"),
    ],
)
def test_mistakes_are_told(workdir, compare, flag, message):
    with pytest.raises(UserError, match=message):
        compare([f"--workdir={workdir}", flag])
