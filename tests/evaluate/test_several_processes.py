"""Two processes without a common disk write the report that one writes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import evaluate_worker
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
METRICS = "accuracy,pgd,autoattack,generation,calibration,abstention,ood,counterfactual"


def evaluate_in_two(workdir, folder, metrics):
    """Runs two processes; returns the report of the first."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, str(ROOT / "tests" / "evaluate_worker.py")]
    together = [
        subprocess.Popen(
            command
            + [str(port), "2", str(rank), str(workdir), f"{folder}/{rank}", metrics],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=600)[0] for process in together]
    finally:
        for process in together:
            process.kill()
    assert [process.returncode for process in together] == [0, 0], printed
    return json.loads((folder / "0" / "report.json").read_text())


def assert_same(one, two):
    assert one["data"] == two["data"]
    for name, metric in one["metrics"].items():
        for figure, expected in metric["figures"].items():
            value = two["metrics"][name]["figures"][figure]["value"]
            assert value == pytest.approx(expected["value"], rel=1e-3, abs=1e-4), figure


@pytest.mark.jobs
@pytest.mark.parametrize(
    "metrics",
    ["accuracy,autoattack", pytest.param(METRICS, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_two_processes_report_what_one_does(trained, tmp_path, metrics):
    one = evaluate_worker.evaluate(trained, str(tmp_path / "one"), metrics.split(","))
    assert_same(one, evaluate_in_two(trained, tmp_path, metrics))
    with (
        np.load(tmp_path / "one" / "autoattack.npz") as a,
        np.load(tmp_path / "0" / "autoattack.npz") as b,
    ):
        np.testing.assert_array_equal(a["robust"], b["robust"])
        np.testing.assert_allclose(a["images"], b["images"], atol=1e-4)
    # Only the first one writes.
    assert not [path for path in (tmp_path / "1").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_stopped_processes_go_on_with_what_the_first_one_has(trained, tmp_path):
    whole = evaluate_in_two(trained, tmp_path, METRICS)
    for path in sorted((tmp_path / "0" / "units").rglob("*.npz"))[::2]:
        path.unlink()
    (tmp_path / "0" / "report.json").unlink()
    assert_same(whole, evaluate_in_two(trained, tmp_path, METRICS))
