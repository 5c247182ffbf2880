"""What all commands say alike."""

import os
import subprocess
import sys

import jax
import pytest

from atebm_jax import UserError, command_line

COMMANDS = {
    "main": ["--config=configs/digits.py"],
    "evaluate": [],
    "sample": ["--out=out"],
    "convert": ["--from=w.pt", "--to=out"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_platform_that_is_not_there_is_told_in_one_sentence(command):
    flags = [*COMMANDS[command], *([] if command == "convert" else ["--workdir=x"])]
    done = subprocess.run(
        [sys.executable, "-m", f"atebm_jax.{command}", *flags],
        env=os.environ | {"JAX_PLATFORMS": "nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: JAX_PLATFORMS=nowhere: JAX cannot use that")
    assert "available: cpu" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError(), "here; available: cpu, tpu."),
        (
            RuntimeError("no\nlibrary (set JAX_PLATFORMS='' to choose)"),
            r"here \(no library\); available",
        ),
    ],
)
def test_platform_without_its_library_is_told(error, reason, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setattr(command_line, "_platforms", lambda: ["cpu", "tpu"])
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match=f"JAX_PLATFORMS=cuda: .*{reason}"):
        command_line.check_platform()
    # What nobody asked for is no mistake of the user's.
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(type(error)):
        command_line.check_platform()
