"""The command as a user starts it: in a process of its own, killed and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "digits"
    settings = {"stage1.num_steps": 2, "evaluate.batch_size": 8}
    tiny.run(tiny.config(stages="stage1", **settings), folder)
    return folder


def start(workdir, out, *more):
    arguments = [f"--workdir={workdir}", f"--out={out}", *more]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "atebm_jax.evaluate", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def test_killed_command_ends_with_the_same_report(workdir, tmp_path):
    what = ("--metrics=accuracy,pgd", "--num_examples=100")
    whole = start(workdir, tmp_path / "whole", *what)
    assert "report and plots are in" in whole.communicate(timeout=200)[0]
    assert whole.returncode == 0
    out = tmp_path / "stopped"
    for number, code, units in ((signal.SIGKILL, -9, 20), (signal.SIGTERM, 143, 40)):
        stopped = start(workdir, out, *what)
        while len(list(out.rglob("units/*/*.npz"))) < units and stopped.poll() is None:
            time.sleep(0.005)
        stopped.send_signal(number)
        said = stopped.communicate(timeout=200)[0]
        assert stopped.returncode == code, said
        assert "Traceback" not in said and not (out / "report.json").exists()
    again = start(workdir, out, *what)
    assert "report and plots are in" in again.communicate(timeout=200)[0]
    texts = [(f / "report.json").read_text() for f in (tmp_path / "whole", out)]
    assert json.loads(texts[0]) == json.loads(texts[1])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--help"], 0, "--inception_weights"),
        (["--metric=all"], 2, "Unknown command line flag"),
        (["--workdir=nowhere"], 2, "there is no checkpoint at nowhere"),
    ],
)
def test_command_line_is_answered(arguments, code, message):
    done = subprocess.run(
        [sys.executable, "-m", "atebm_jax.evaluate", *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    said = done.stdout + done.stderr
    assert message in said and "Traceback" not in said
