"""Small digits jobs in processes of their own, and what is left in their workdirs."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from atebm_jax import checkpoint, checksums

ROOT = Path(__file__).parents[2]
# Config files, as they are named from there. The second one's network compiles fast.
DIGITS, SMALL = "configs/digits.py", "tests/small.py"
STAGES = ("stage1", "stage2")

SETTINGS = (
    "--config.log_every_steps=2",
    "--config.stage1.batch_size=64",
    "--config.stage1.num_steps=24",
    "--config.stage1.eval_every_steps=12",
    "--config.stage1.checkpoint_every_steps=2",
    "--config.stage2.batch_size=64",
    "--config.stage2.num_steps=24",
    "--config.stage2.warmup_steps=0",
    "--config.stage2.eval_every_steps=12",
    "--config.stage2.checkpoint_every_steps=2",
    "--config.stage2.auc_window_images=128",
    "--config.evaluate.samples.num=20",
    "--config.evaluate.samples.num_test=20",
    "--config.evaluate.samples.num_steps=5",
    "--config.evaluate.num_test_examples=100",
)


def arguments(workdir: Path, *flags: str, config: str = DIGITS) -> list[str]:
    """The command line of the small job, without the interpreter."""
    where = (f"--config={config}", f"--workdir={workdir}")
    return ["atebm_jax.main", *where, *SETTINGS, *flags]


def joined(count: int) -> list[tuple[str, ...]]:
    """For each of `count` processes the flags that join them."""
    if count == 1:
        return [()]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = (f"--coordinator=localhost:{port}", f"--num_processes={count}")
    return [(*shared, f"--process_id={rank}") for rank in range(count)]


def log_of(workdir: Path) -> Path:
    """Where the output of a workdir's jobs goes."""
    return workdir.parent / f"{workdir.name}.log"


def environment(workdir: Path) -> dict[str, str]:
    """With a compilation cache beside the workdir, where none is set."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    return cache | os.environ | {"JAX_PLATFORMS": "cpu"}


def start(workdir: Path, *flags: str, config: str = DIGITS) -> subprocess.Popen:
    """Starts the job by its command, in a process group of its own, or goes on."""
    log = log_of(workdir).open("a")
    return subprocess.Popen(
        [sys.executable, "-m", *arguments(workdir, *flags, config=config)],
        cwd=ROOT,
        stdout=log,
        stderr=log,
        start_new_session=True,
        env=environment(workdir),
    )


def start_joined(
    workdir: Path, count: int, *flags: str, config: str = DIGITS
) -> list[subprocess.Popen]:
    """Starts the job by its command in `count` processes."""
    return [start(workdir, *flags, *own, config=config) for own in joined(count)]


class Forked:
    """Starts jobs by forking a process that has the packages imported.

    Five CPU seconds less a start; otherwise what the command does.
    """

    def __init__(self, folder: Path, config: str = DIGITS):
        self._config = config
        os.environ.update(environment(folder / "any"))
        os.environ["PYTHONPATH"] = str(ROOT)
        os.chdir(ROOT)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["atebm_jax.job", "atebm_jax.main"])

    def start(
        self, workdir: Path, count: int, *flags: str
    ) -> list[multiprocessing.process.BaseProcess]:
        """Starts the job in `count` processes."""
        processes = []
        for own in joined(count):
            command = arguments(workdir, *flags, *own, config=self._config)
            process = self._context.Process(
                target=_run_command, args=(command, log_of(workdir))
            )
            process.start()
            processes.append(process)
        return processes


def _run_command(command: list[str], log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = command
    from atebm_jax import main

    main.cli()


def steps(workdir: Path, stage: str) -> list[int]:
    """The listed steps of a stage."""
    return checkpoint.steps_in(checkpoint.stage_folder(workdir, stage))


def broken_steps(workdir: Path) -> tuple[int, list[str]]:
    """How many steps are listed, and those that are not what was saved."""
    number, broken = 0, []
    for stage in STAGES:
        for step in steps(workdir, stage):
            folder = checkpoint.stage_folder(workdir, stage) / str(step)
            number += 1
            if not checksums.exist(folder):
                broken.append(f"{folder}: no checksums")
            elif fault := checksums.damage(folder):
                broken.append(f"{folder}: {fault}")
            else:
                _read(folder)
    return number, broken


def _read(folder: epath.Path) -> dict:
    """Every array of a step, on the host, however many devices have written it."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder / "state").item_metadata.tree
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        return checkpointer.restore(
            folder / "state",
            args=ocp.args.PyTreeRestore(
                restore_args=jax.tree.map(lambda _: as_numpy, tree)
            ),
        )


def arrays(workdir: Path, stage: str) -> dict[str, np.ndarray]:
    """Every array of a stage's last checkpoint."""
    step = steps(workdir, stage)[-1]
    tree = _read(checkpoint.stage_folder(workdir, stage) / str(step))
    flat: dict[str, np.ndarray] = {}

    def collect(prefix: str, node: object) -> None:
        items = (
            node.items()
            if isinstance(node, dict)
            else enumerate(node)
            if isinstance(node, list | tuple)
            else None
        )
        if items is None:
            if node is not None:
                flat[f"{stage}{prefix}"] = np.asarray(node)
            return
        for name, child in items:
            collect(f"{prefix}/{name}", child)

    collect(f"/{step}", tree)
    return flat


def metrics(workdir: Path) -> list[dict]:
    """The metrics of a run without those that measure time."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        record.pop("images_per_second", None)
    return records


def differences(first: Path, second: Path) -> list[str]:
    """What differs between the ends of two runs; empty if nothing does."""
    found = []
    for stage in STAGES:
        a, b = arrays(first, stage), arrays(second, stage)
        found += [f"array {k} is in one only" for k in a.keys() ^ b.keys()]
        found += [
            f"array {k} differs"
            for k in a.keys() & b.keys()
            if a[k].tobytes() != b[k].tobytes()
        ]
    if metrics(first) != metrics(second):
        found.append("metrics.jsonl differs")
    return found
