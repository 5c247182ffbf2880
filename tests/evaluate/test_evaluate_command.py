"""The command as a user starts it: in a process of its own, killed and gone on with."""

import json
import signal
import subprocess
import sys
import time

import jax
import pytest
import tiny

from atebm_jax.evaluate import __main__ as command
from atebm_jax.evaluate import suite
from atebm_jax.evaluate.options import Options


def start(workdir, out, *more):
    """Starts the command, on as many devices as there are here."""
    arguments = (f"--workdir={workdir}", f"--out={out}", *more)
    environment = tiny.environment(jax.device_count())
    environment.pop("XLA_FLAGS", None)
    return subprocess.Popen(
        tiny.command("atebm_jax.evaluate", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def units_in(out):
    return len(list(out.rglob("units/*/*.npz")))


@pytest.mark.jobs
def test_killed_command_ends_with_the_same_report(trained, tmp_path):
    metrics, options = ("accuracy", "pgd"), Options(epsilons=(0.25,))
    flags = ("--metrics=accuracy,pgd", "--epsilons=0.25")
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    expected = suite.evaluate(trained, whole, metrics=metrics, options=options)
    # Of a fingerprint, logits and two attacks, nine batches each.
    assert units_in(whole) == 36
    for number, code, units in ((signal.SIGKILL, -9, 12), (signal.SIGTERM, 143, 20)):
        stopped = start(trained, out, *flags)
        while units_in(out) < units and stopped.poll() is None:
            time.sleep(0.005)
        stopped.send_signal(number)
        said = stopped.communicate(timeout=200)[0]
        assert stopped.returncode == code, said
        assert "Traceback" not in said and not (out / "report.json").exists()
    last = start(trained, out, *flags)
    assert "report and plots are in" in last.communicate(timeout=200)[0]
    assert last.returncode == 0
    report = json.loads((out / "report.json").read_text())
    assert report == json.loads(json.dumps(expected))
    # Nothing was made a second time under another name.
    assert units_in(out) == units_in(whole)


def test_help_names_the_flags(capsys):
    with pytest.raises(SystemExit) as stopped:
        command._parse(["evaluate", "--help"])
    assert stopped.value.code == 0
    assert "--inception_weights" in capsys.readouterr().out


def test_mistake_ends_the_process_with_2():
    done = subprocess.run(
        [sys.executable, "-m", "atebm_jax.evaluate", "--workdir=nowhere"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "there is no checkpoint at nowhere" in done.stderr
    assert "Traceback" not in done.stderr
