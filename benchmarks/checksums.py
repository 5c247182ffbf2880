"""Milliseconds a GiB to list and to check the files of a checkpoint.

    python benchmarks/checksums.py --mebibytes=1024 --repeats=5

Writes that much in eight files to a temporary folder and reads it back from the page
cache: what hashing costs, without the storage. Saving lists the files in the
background, while the next steps run; a restart checks them before it begins.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from etils import epath

from atebm_jax import checksums

FILES = 8


def milliseconds(function: Callable[[], object], gibibytes: float) -> tuple[float, ...]:
    """(CPU, wall) milliseconds a GiB of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return 1000 * cpu / gibibytes, 1000 * wall / gibibytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    gibibytes = flags.mebibytes / 1024
    with tempfile.TemporaryDirectory() as name:
        folder = epath.Path(name)
        content = os.urandom(1 << 20)
        for index in range(FILES):
            with (Path(name) / str(index)).open("wb") as file:
                for _ in range(flags.mebibytes // FILES):
                    file.write(content)
        print("| | CPU ms a GiB | wall ms a GiB |\n|---|---:|---:|")
        for label, function in (
            ("list (after a save)", lambda: checksums.write(folder)),
            ("check (before a restart)", lambda: checksums.damage(folder)),
        ):
            times = [milliseconds(function, gibibytes) for _ in range(flags.repeats)]
            cpu, wall = (
                statistics.median(column) for column in zip(*times, strict=True)
            )
            print(f"| {label} | {cpu:.0f} | {wall:.0f} |")
    print(f"medians of {flags.repeats}, {os.cpu_count()} CPUs")


if __name__ == "__main__":
    main()
