"""Kills a small digits job at random moments and compares its end with another's.

    python tests/faults/kill.py --kills=100 --processes=1 --seed=0

Runs the same job twice, in one process or two: once left alone, once killed by SIGKILL
and started again by the same command, over and over. The moments are spread over
starting, loading data, stepping, evaluating, saving, committing and deleting a
checkpoint; of two processes one dies, the other one or both. After each kill every
listed checkpoint is checked and read. Exits with 1 unless all of them are whole and the
last checkpoints hold the same arrays bit by bit, with the same metrics.
"""

import argparse
import collections
import random
import shutil
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import jobs
import moments
from rich.console import Console
from rich.table import Table

from atebm_jax.command_line import quiet_libraries

# What a process whose partner was killed gets to end by itself.
_GRACE = 5.0

# A worker process costs a start of its own: only where it is waited for.
_WORKERS = {"loading data": ("--config.data.num_workers=1",)}


class Tally:
    """What the kills hit."""

    def __init__(self) -> None:
        self.kills = 0
        self.checked = 0
        self.passes = 0
        self.hits: dict[str, collections.Counter] = collections.defaultdict(
            collections.Counter
        )
        self.found: list[str] = []

    def table(self) -> Table:
        """Kills by moment, and what the workdir showed after them."""
        states = sorted({state for hits in self.hits.values() for state in hits})
        table = Table(title=f"{self.kills} kills")
        for name in ("killed while", "kills", *states):
            table.add_column(
                name, justify="left" if name == "killed while" else "right"
            )
        for moment in moments.DELAYS:
            hits = self.hits[moment]
            table.add_row(
                moment, str(hits.total()), *(str(hits[state]) for state in states)
            )
        return table


def finish(forked: jobs.Forked, workdir: Path, count: int) -> None:
    """Runs the job to its end."""
    processes = forked.start(workdir, count)
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        log = jobs.log_of(workdir).read_text()
        sys.exit(f"the job in {workdir} failed:\n{log[-3000:]}")


def kill(processes: list[BaseProcess], rng: random.Random) -> str:
    """Kills one process or all, the rest after a while; returns whom."""
    chosen = rng.choice([processes, *([p] for p in processes)])
    for process in chosen:
        process.kill()
    for process in chosen:
        process.join()
    rest = [process for process in processes if process not in chosen]
    for process in rest:
        process.join(_GRACE)
        process.kill()
        process.join()
    victims = [str(processes.index(process)) for process in chosen]
    return f"process {' and '.join(victims)}"


def kill_over_and_over(
    forked: jobs.Forked,
    alone: Path,
    workdir: Path,
    *,
    count: int,
    kills: int,
    rng: random.Random,
) -> Tally:
    """Kills the job so many times; begins anew whenever it gets to its end."""
    tally = Tally()
    while tally.kills < kills:
        moment = rng.choice(moments.possible(workdir))
        processes = forked.start(workdir, count, *_WORKERS.get(moment, ()))
        watch = moments.Watch(workdir, [process.pid for process in processes])
        if not watch.wait(moment, processes, rng):
            for process in processes:
                process.join()
            if any(process.exitcode for process in processes):
                log = jobs.log_of(workdir).read_text()
                tally.found.append(f"a start failed: {log[-1500:]}")
                return tally
            tally.found += jobs.differences(alone, workdir)
            tally.passes += 1
            print(f"     {moment}, not killed: came to its end; begun anew", flush=True)
            shutil.rmtree(workdir)
            continue
        victims = kill(processes, rng)
        tally.kills += 1
        state = watch.state()
        tally.hits[moment][state] += 1
        number, broken = jobs.broken_steps(workdir)
        tally.checked += number
        tally.found += broken
        at = " ".join(f"{s} {jobs.steps(workdir, s)}" for s in jobs.STAGES)
        whole = f"{len(broken)} broken" if broken else "all whole"
        hit = f"{tally.kills:4} {moment}, {victims} killed: {state}"
        print(f"{hit}; {at}, {whole}", flush=True)
    finish(forked, workdir, count)
    tally.found += jobs.differences(alone, workdir)
    tally.passes += 1
    return tally


def compare(
    folder: Path, kills: int, seed: int, count: int = 1, config: str = jobs.DIGITS
) -> Tally:
    """Runs both jobs in a folder, on `count` processes."""
    forked = jobs.Forked(folder, config)
    alone, killed = folder / "alone", folder / "killed"
    # It also fills the compilation cache.
    finish(forked, alone, count)
    rng = random.Random(seed)
    return kill_over_and_over(forked, alone, killed, count=count, kills=kills, rng=rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    chosen = parser.parse_args()
    quiet_libraries()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally = compare(Path(folder), chosen.kills, chosen.seed, chosen.processes)
    Console(width=150).print(tally.table())
    print(
        f"{chosen.processes} process(es), seed {chosen.seed}: {tally.kills} kills, "
        f"{tally.checked} listed checkpoints checked and read, {tally.passes} ends "
        f"compared with the undisturbed one, in {time.monotonic() - began:.0f} s"
    )
    print("\n".join(tally.found) if tally.found else "the same, bit by bit")
    sys.exit(1 if tally.found else 0)


if __name__ == "__main__":
    main()
