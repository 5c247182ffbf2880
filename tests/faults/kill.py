"""Kills a small digits job at random moments and compares its end with another's.

    python tests/faults/kill.py --kills=10 --seed=0

Runs the same job twice in subprocesses: once left alone, once killed by SIGKILL at
random moments and started again by the same command. Exits with 1 unless the last
checkpoints hold the same arrays bit by bit and the metrics are the same.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[2]

SETTINGS = (
    "--config.log_every_steps=2",
    "--config.stage1.num_steps=60",
    "--config.stage1.eval_every_steps=20",
    "--config.stage1.checkpoint_every_steps=4",
    "--config.stage2.num_steps=60",
    "--config.stage2.eval_every_steps=20",
    "--config.stage2.checkpoint_every_steps=4",
    "--config.stage2.auc_window_images=128",
    "--config.evaluate.samples.num=20",
    "--config.evaluate.samples.num_test=20",
    "--config.evaluate.samples.num_steps=5",
    "--config.evaluate.num_test_examples=100",
)


def start(workdir: Path, *flags: str) -> subprocess.Popen:
    """Starts the job in a process group of its own, or goes on with it."""
    command = [sys.executable, "-m", "atebm_jax.main", f"--workdir={workdir}"]
    log = (workdir.parent / f"{workdir.name}.log").open("a")
    return subprocess.Popen(
        [*command, "--config=configs/digits.py", *SETTINGS, *flags],
        cwd=ROOT,
        stdout=log,
        stderr=log,
        start_new_session=True,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache")},
    )


def finish(workdir: Path) -> float:
    """Runs the job to its end; returns the seconds it took."""
    began = time.monotonic()
    if start(workdir).wait() != 0:
        log = (workdir.parent / f"{workdir.name}.log").read_text()
        sys.exit(f"the job in {workdir} failed:\n{log[-3000:]}")
    return time.monotonic() - began


def kill_and_restart(
    workdir: Path, kills: int, longest: float, rng: random.Random
) -> None:
    """Kills the running job so many times; begins anew whenever it gets to its end."""
    hits = 0
    while hits < kills:
        process = start(workdir)
        moment = rng.uniform(0.0, longest)
        try:
            process.wait(moment)
            print(f"  finished before its kill at {moment:.1f} s: begun anew")
            shutil.rmtree(workdir)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            hits += 1
            print(f"  killed after {moment:.1f} s, at {last_step(workdir)}")


def last_step(workdir: Path) -> str:
    """Where the job was, by the last line of its metrics."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    if not lines:
        return "the start"
    try:
        record = json.loads(lines[-1])
    except json.JSONDecodeError:
        return "a half-written line"
    return f"{record['stage']} step {record['step']}"


def arrays(workdir: Path, stage: str) -> dict[str, np.ndarray]:
    """Every array of a stage's last checkpoint."""
    folder = workdir / "checkpoints" / stage
    step = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(folder / str(step) / "state")
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


def differences(alone: Path, killed: Path) -> list[str]:
    """What differs between the ends of two runs; empty if nothing does."""
    found = []
    for stage in ("stage1", "stage2"):
        a, b = arrays(alone, stage), arrays(killed, stage)
        found += [f"array {k} is in one only" for k in a.keys() ^ b.keys()]
        found += [
            f"array {k} differs"
            for k in a.keys() & b.keys()
            if a[k].tobytes() != b[k].tobytes()
        ]
    if metrics(alone) != metrics(killed):
        found.append("metrics.jsonl differs")
    return found


def compare(folder: Path, kills: int, seed: int) -> list[str]:
    """Runs both jobs in a folder; returns the differences of their ends."""
    alone, killed, warm = folder / "alone", folder / "killed", folder / "warm"
    finish(alone)
    # The first run also filled the compilation cache: the second one is the measure.
    seconds = finish(warm)
    print(f"undisturbed: {seconds:.0f} s")
    kill_and_restart(killed, kills, 0.8 * seconds, random.Random(seed))
    finish(killed)
    return differences(alone, killed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), arguments.kills, arguments.seed)
    print("\n".join(found) if found else "the same, bit by bit")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
