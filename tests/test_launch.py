"""Launchers: what they would run, what they refuse, and that twice is harmless."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[1]
SCRIPTS = ("local", "tpu_pod", "gpu_slurm", "xpk_gke")

# What each launcher cannot do without.
NEEDED = {
    "local": [],
    "tpu_pod": ["--tpu=pod", "--zone=us-west4-a"],
    "gpu_slurm": [],
    "xpk_gke": ["--cluster=c", "--zone=z", "--tpu_type=v5litepod-256", "--image=i:1"],
}
WORKDIR = "gs://bucket/run 1"
JOB = ["configs/digits.py", WORKDIR]
OVERRIDES = ["--config.data.augment_cls=pad_crop(1)|flip", "--allow_config_change"]
MAIN = ["-m", "atebm_jax.main", "--config=configs/digits.py", f"--workdir={WORKDIR}"]


def launch(script, *arguments, **environment):
    return subprocess.run(
        [ROOT / "launch" / f"{script}.sh", *arguments],
        capture_output=True,
        check=False,
        text=True,
        env=os.environ | environment,
        timeout=60,
    )


def shown(script, *arguments):
    """The words of the command that a dry run shows."""
    result = launch(script, *NEEDED[script], *arguments, "--dry_run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("would run: ")
    return shlex.split(result.stdout.removeprefix("would run: "))


@pytest.fixture
def tools(tmp_path):
    """Stand-ins on the path that note their arguments and say what they are told."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(name, prints=""):
        path = folder / name
        path.write_text(
            f"#!{sys.executable}\nimport sys\n"
            f"open({str(tmp_path / name)!r}, 'a').write(repr(sys.argv[1:]) + '\\n')\n"
            f"print({prints!r}) if sys.argv[1:3] != ['workload', 'create'] else None\n"
        )
        path.chmod(0o755)

    def calls(name):
        path = tmp_path / name
        return (
            [eval(line) for line in path.read_text().splitlines()]
            if (path.exists())
            else []
        )

    make.calls = calls
    make.path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    return make


def test_local_dry_run_shows_the_command():
    command = shown("local", "--python=py", *JOB, *OVERRIDES)
    assert command == ["py", *MAIN, *OVERRIDES]


def test_several_machines_are_given_their_numbers():
    machines = ["--coordinator=host:1", "--num_processes=2", "--process_id=0"]
    assert shown("local", "--python=py", *machines, *JOB) == ["py", *MAIN, *machines]


def test_slurm_dry_run_shows_one_process_a_gpu():
    options = ["--nodes=2", "--gpus_per_node=4", "--partition=gpu", "--python=py"]
    command = shown("gpu_slurm", *options, *JOB, *OVERRIDES)
    assert command[0] == "sbatch"
    for option in ("--nodes=2", "--ntasks-per-node=4", "--gres=gpu:4", "--requeue"):
        assert option in command
    assert {"--partition=gpu", "--dependency=singleton"} <= set(command)
    assert not any(word.startswith(("--account", "--time")) for word in command)
    (wrapped,) = [word for word in command if word.startswith("--wrap=")]
    step = shlex.split(wrapped.removeprefix("--wrap="))
    assert step[:2] == ["exec", "srun"] and "--gpu-bind=none" in step
    assert step[step.index("py") :] == ["py", *MAIN, *OVERRIDES]


def test_xpk_dry_run_shows_a_workload_of_every_slice():
    command = shown("xpk_gke", "--num_slices=2", *JOB, *OVERRIDES)
    assert command[:3] == ["xpk", "workload", "create"]
    expected = {"--cluster=c", "--zone=z", "--tpu-type=v5litepod-256", "--num-slices=2"}
    assert expected | {"--docker-image=i:1", "--max-restarts=50"} <= set(command)
    inner = shlex.split(command[-1].removeprefix("--command="))
    assert inner == ["python3", *MAIN, *OVERRIDES]


def test_tpu_dry_run_shows_hosts_and_command():
    result = launch("tpu_pod", *NEEDED["tpu_pod"], *JOB, *OVERRIDES, "--dry_run")
    assert result.returncode == 0
    assert "gcloud compute tpus tpu-vm ssh pod --zone=us-west4-a --worker=all" in (
        result.stdout
    )
    assert "nohup .venv/bin/python -m atebm_jax.main" in (result.stdout)


def test_name_of_a_job_is_that_of_its_workdir():
    def name(workdir):
        command = shown("gpu_slurm", "configs/digits.py", workdir)
        return next(word for word in command if word.startswith("--job-name="))

    assert name("/a/b") == name("/a/b") != name("/a/c")


def test_job_in_the_queue_is_not_submitted_again(tools):
    tools("sbatch")
    tools("squeue", "17 RUNNING")
    result = launch("gpu_slurm", *JOB, **tools.path)
    assert result.returncode == 0 and "17 RUNNING" in result.stdout
    assert tools.calls("sbatch") == []
    tools("squeue")
    assert launch("gpu_slurm", *JOB, **tools.path).returncode == 0
    assert len(tools.calls("sbatch")) == 1


@pytest.mark.parametrize(
    ("status", "made"), [("Admitted", 0), ("Finished", 1), (None, 1)]
)
def test_workload_is_created_once_and_again_when_it_ended(tools, status, made):
    (name,) = [w for w in shown("xpk_gke", *JOB) if w.startswith("--workload=")]
    name = name.removeprefix("--workload=")
    tools("xpk", f"Jobset Name  Status\n{name}   4   {status}   x" if status else "")
    result = launch("xpk_gke", *NEEDED["xpk_gke"], *JOB, **tools.path)
    assert result.returncode == 0, result.stderr
    verbs = [call[1] for call in tools.calls("xpk")]
    assert verbs.count("create") == made
    assert verbs.count("delete") == (status == "Finished")


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is not installed")
def test_host_of_a_pod_runs_one_job(tools, tmp_path):
    """The command that gcloud would carry to a host, run here twice."""
    tools("gcloud")
    options = [f"--remote_dir={tmp_path}", f"--python={tmp_path / 'py'}"]
    launch("tpu_pod", *NEEDED["tpu_pod"], *options, *JOB, **tools.path)
    ((*_, command),) = tools.calls("gcloud")
    remote = command.removeprefix("--command=")
    (tmp_path / "py").write_text('#!/bin/sh\necho "$@"\nexec sleep 5\n')

    def host():
        return subprocess.run(
            ["bash", "-c", remote],
            capture_output=True,
            check=False,
            text=True,
            env=os.environ | {"HOME": str(tmp_path)},
            timeout=4,
        )

    assert host().returncode == 2  # what is there cannot be run yet
    (tmp_path / "py").chmod(0o755)
    first, second = host(), host()
    assert first.returncode == second.returncode == 0
    assert "started process" in first.stdout
    assert f"already running {WORKDIR}" in second.stdout
    log = tmp_path / "atebm_jax.log"
    tiny.wait_until(log.read_text)
    assert log.read_text().split() == " ".join(MAIN).split()


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is not installed")
def test_local_job_is_not_started_twice(tmp_path):
    program = tmp_path / "py"
    program.write_text("#!/bin/sh\nexec sleep 20\n")
    program.chmod(0o755)
    arguments = [f"--python={program}", "configs/digits.py", str(tmp_path / "run")]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    script = ROOT / "launch" / "local.sh"
    with subprocess.Popen([script, *arguments], env=environment) as running:
        while not list(tmp_path.glob("*.lock")):
            time.sleep(0.05)
        time.sleep(0.5)
        again = launch("local", *arguments, TMPDIR=str(tmp_path))
        running.kill()
    assert again.returncode == 0 and "already running" in again.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/digits.py"], "CONFIG and WORKDIR are needed"),
        (["configs/none.py", WORKDIR], "no config file configs/none.py"),
        ([*JOB, "third"], "unexpected argument third"),
        ([*JOB, "--nodse=2"], "--nodse is no option"),
        ([*JOB, "--python="], "--python is empty"),
        ([*JOB, "--python"], "--python has no value"),
    ],
)
def test_mistake_is_one_sentence(script, arguments, message):
    result = launch(script, *NEEDED[script], *arguments, "--dry_run")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tpu_pod", ["--tpu=x", *JOB], "--zone is missing"),
        ("tpu_pod", ["--tpu=x", "--zone=z", JOB[0], "/local"], "gs://BUCKET/FOLDER"),
        ("xpk_gke", [*NEEDED["xpk_gke"], JOB[0], "/local"], "gs://BUCKET/FOLDER"),
        ("xpk_gke", [*NEEDED["xpk_gke"][1:], *JOB], "--cluster is missing"),
        ("xpk_gke", [*NEEDED["xpk_gke"], "--num_slices=0", *JOB], "whole number"),
        ("gpu_slurm", ["--nodes=two", *JOB], "--nodes is two"),
        ("local", ["--coordinator=h:1", *JOB], "--num_processes is missing"),
    ],
)
def test_what_only_one_launcher_refuses(script, arguments, message):
    result = launch(script, *arguments, "--dry_run")
    assert result.returncode == 2 and message in result.stderr


def test_missing_tool_is_named(tmp_path):
    for tool in ("bash", "dirname", "basename", "env"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    result = launch("gpu_slurm", *JOB, PATH=str(tmp_path))
    assert result.returncode == 2 and "sbatch is not installed" in result.stderr


def test_launchers_pass_shellcheck():
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed (extra test)")
    scripts = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "launch").glob("*.sh"))
    assert len(scripts) == len(SCRIPTS) + 1
    result = subprocess.run(
        [program, "--external-sources", *scripts],
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
    )
    assert result.returncode == 0, result.stdout
