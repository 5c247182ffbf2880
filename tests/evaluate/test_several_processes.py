"""Two processes without a common disk write the report that one writes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

ROOT = Path(__file__).parents[2]
METRICS = "accuracy,pgd,autoattack,generation,calibration,ood,counterfactual"


def evaluate(count, workdir, folder, metrics=METRICS):
    """Runs so many processes; returns process 0's report."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, ROOT / "tests" / "evaluate_worker.py", port, count]
    together = [
        subprocess.Popen(
            [*map(str, command), str(rank), str(workdir), f"{folder}/{rank}", metrics],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        printed = [process.communicate(timeout=400)[0] for process in together]
    finally:
        for process in together:
            process.kill()
    assert [process.returncode for process in together] == [0] * count, printed
    return json.loads((folder / "0" / "report.json").read_text())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "digits"
    settings = {"stage1.num_steps": 4, "evaluate.attack.num_steps": 2}
    tiny.run(tiny.config(stages="stage1", **settings), folder)
    return folder


def same(one, many):
    assert one["data"] == many["data"]
    for name, metric in one["metrics"].items():
        for figure, expected in metric["figures"].items():
            value = many["metrics"][name]["figures"][figure]["value"]
            assert value == pytest.approx(expected["value"], rel=1e-3, abs=1e-4), figure


@pytest.mark.parametrize(
    "metrics",
    ["accuracy,autoattack,generation", pytest.param(METRICS, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_two_processes_report_what_one_does(workdir, tmp_path, metrics):
    one = evaluate(1, workdir, tmp_path / "one", metrics)
    two = evaluate(2, workdir, tmp_path / "two", metrics)
    same(one, two)
    with (
        np.load(tmp_path / "one" / "0" / "autoattack.npz") as a,
        np.load(tmp_path / "two" / "0" / "autoattack.npz") as b,
    ):
        np.testing.assert_array_equal(a["robust"], b["robust"])
        np.testing.assert_allclose(a["images"], b["images"], atol=1e-4)
    # Only the first one writes.
    assert not list((tmp_path / "two" / "1").rglob("*.*"))
    # Half of the first one's units are lost: both make them anew, and no more.
    units = sorted((tmp_path / "two" / "0" / "units").rglob("*.npz"))
    for path in units[::2]:
        path.unlink()
    (tmp_path / "two" / "0" / "report.json").unlink()
    same(one, evaluate(2, workdir, tmp_path / "two", metrics))
