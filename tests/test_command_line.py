"""What all commands say alike."""

import asyncio
import gc
import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
import tensorstore

import atebm_jax
from atebm_jax import UserError, command_line
from atebm_jax.convert import __main__ as convert
from atebm_jax.data import prepare
from atebm_jax.sample import flags as sample_flags

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
    with pytest.raises(UserError, match=f"JAX_PLATFORMS=cuda: .*{reason}"):
        atebm_jax.load("runs/digits")
    # What nobody asked for is no mistake of the user's.
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(type(error)):
        command_line.check_platform()


@pytest.mark.parametrize("row", ["", ":small"])
def test_home_is_found_in_the_path_of_a_config(tmp_path, monkeypatch, row):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "from atebm_jax import config\n\ndef get_config(row='none'):\n"
    text += "    made = config.default()\n    made.stages = row\n    return made\n"
    (tmp_path / "mine.py").write_text(text)
    assert command_line.load_config(f"~/mine.py{row}").stages == (row[1:] or "none")
    there, other = f"--config={tmp_path}/mine.py{row}", "--config.data.train=folder:~/x"
    for given, made in (
        ([f"--config=~/mine.py{row}", "--x=~/y"], [there, "--x=~/y"]),
        (["--config", f"~/mine.py{row}", other], [there, other]),
    ):
        assert command_line.checked_arguments(given) == made


CONFIG = ["--config=configs/digits.py", "--config.seed=x", "--noconfig.stage2.log_r1"]
CONFIG += ["--config.data.image_shape=(8,8,1)"]
LATER = ["--config", "configs/cifar10.py:small", "--config.stage2.log_r1"]
LATER += ["--config.data.image_shape=(64,64,3)", "--config.seed", "7"]
READ = {
    "main": "[flags.FLAGS.workdir, flags.FLAGS.devices, flags.FLAGS.dry_run]",
    "evaluate": "[m._FLAGS.workdir, m._FLAGS.seed, m._FLAGS.metrics]",
}


@pytest.mark.parametrize(
    ("command", "first", "last", "values"),
    [
        (
            "main",
            ["--workdir=a", "--devices=2", "--dry_run"],
            ["--workdir=b", "--devices", "3", "--nodry_run"],
            ["b", 3, False],
        ),
        (
            "evaluate",
            ["--workdir=a", "--seed=1", "--metrics=pgd,ood"],
            ["--workdir=b", "--seed", "2", "--metrics=accuracy"],
            ["b", 2, ["accuracy"]],
        ),
    ],
)
def test_last_of_two_flags_counts_also_in_the_config(command, first, last, values):
    """In a process of its own: absl keeps what it has parsed."""
    module = "main" if command == "main" else "evaluate.__main__"
    code = f"""import importlib, json, sys
from absl import flags
m = importlib.import_module("atebm_jax.{module}")
m._parse(sys.argv)
c = getattr(m, "_FLAGS", flags.FLAGS).config
shown = [c.seed, c.stage2.log_r1, c.data.image_shape, c.model.depth]
print(json.dumps([{READ[command]}, shown]))"""
    done = subprocess.run(
        [sys.executable, "-c", code, *CONFIG, *first, *last, *LATER],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [values, [7, True, [64, 64, 3], 16]]


@pytest.mark.parametrize(
    ("parser", "needed"),
    [
        (sample_flags.of_sampling, ["--workdir=a", "--out=a"]),
        (sample_flags.of_explain, ["x.png", "--workdir=a", "--out=a", "--target=1"]),
        (sample_flags.of_edit, ["x.png", "--workdir=a", "--out=a", "--task=inpaint"]),
        (convert._parser, ["--from=a", "--to=a"]),
        (prepare._parser, ["--to=a"]),
    ],
)
def test_last_of_two_flags_counts(parser, needed):
    flags = [flag for flag in needed if flag.startswith("--")]
    again = [flag.partition("=")[0] + "=2" for flag in flags]
    given = vars(parser().parse_args([*needed, *again]))
    for flag in again:
        name = {"from": "source"}.get(flag[2:-2], flag[2:-2])
        assert given[name] == "2"


@pytest.mark.parametrize("command", ["main", "evaluate"])
def test_commands_take_a_config_from_the_home(tmp_path, command):
    """In a process of its own: absl reads the file, not `load_config`."""
    (tmp_path / "mine.py").write_text(
        "from atebm_jax import config\n\n"
        "def get_config():\n    return config.default()\n"
    )
    rest = ["--dry_run"] if command == "main" else ["--workdir=nowhere"]
    done = subprocess.run(
        [sys.executable, "-m", f"atebm_jax.{command}", "--config=~/mine.py", *rest],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    told = {"main": "config.data.train is empty", "evaluate": "checkpoint at nowhere"}
    assert told[command] in done.stderr and "Traceback" not in done.stderr


def test_mistake_is_one_line_whatever_names_it_holds(capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.fail(UserError("tea\n\x1b[2Jcaf\udce9 [bold] is no image."))
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed == "error: tea \\x1b[2Jcaf\\xe9 [bold] is no image.\n"


def test_what_a_failed_save_leaves_behind_shows_no_traceback(monkeypatch, capfd):
    """Arrays that Orbax was still writing end in an event loop that is closed."""
    gc.collect()  # what other tests left behind
    capfd.readouterr()
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    command_line.quiet_libraries()
    promise, future = tensorstore.Promise.new()

    async def written():
        await future

    async def save():
        asyncio.get_running_loop().create_task(written())
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(save())
    loop.close()
    promise.set_result(None)
    del loop
    gc.collect()
    assert capfd.readouterr().err == ""

    class Broken:
        def __del__(self):
            raise ValueError("shown")

    Broken()
    assert "ValueError: shown" in capfd.readouterr().err


@pytest.mark.parametrize("has_gpu", [False, True])
def test_plugin_of_a_gpu_that_is_not_here_shows_no_traceback(
    has_gpu, tmp_path, monkeypatch, caplog
):
    """A GPU that is here and cannot be used is told of; so are other plugins."""
    device = tmp_path / "nvidia0"
    if has_gpu:
        device.touch()
    monkeypatch.setattr(command_line, "_NVIDIA", (str(device),))
    log = logging.getLogger("jax._src.xla_bridge")
    monkeypatch.setattr(log, "filters", [])
    command_line.quiet_libraries()
    said = "Jax plugin configuration error: Exception when calling %s.initialize()"
    for plugin in ("jax_plugins.xla_cuda13", "jax_plugins.xla_rocm7"):
        log.error(said, plugin)
    told = [record.args[0] for record in caplog.records if record.name == log.name]
    shown = ["jax_plugins.xla_cuda13"] if has_gpu else []
    assert told == [*shown, "jax_plugins.xla_rocm7"]


def test_what_a_failed_read_leaves_behind_shows_no_traceback(monkeypatch):
    """Orbax's coroutines are passed over, others not."""
    told = []
    monkeypatch.setattr(sys, "__unraisablehook__", told.append)
    for file in ("orbax/checkpoint/serialization.py", "ours.py"):
        coroutine = SimpleNamespace(cr_code=SimpleNamespace(co_filename=file))
        left = SimpleNamespace(object=coroutine, exc_value=ValueError())
        command_line._unraisable(left)
    assert told == [left]
