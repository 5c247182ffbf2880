"""Seconds until a folder of a million images is open: `python benchmarks/start_up.py`.

Makes a tree of empty files, 1,000 class folders, in a temporary folder (one inode a
file, no content), opens it as a `folder:` source, and does so at an eighth of the size
too: nothing that opens it may be quadratic.
"""

import argparse
import tempfile
import time
from pathlib import Path

from atebm_jax import data

CLASSES = 1000


def make_tree(root: Path, count: int) -> None:
    for label in range(CLASSES):
        folder = root / f"n{label:08d}"
        folder.mkdir()
        for index in range(count // CLASSES):
            (folder / f"n{label:08d}_{index}.JPEG").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_280_000, help="files")
    count = parser.parse_args().count
    print("| files | seconds to open | microseconds a file |")
    print("|---:|---:|---:|")
    for number in (count // 8, count):
        with tempfile.TemporaryDirectory() as folder:
            make_tree(Path(folder), number)
            began = time.perf_counter()
            source = data.open_source(f"folder:{folder}")
            seconds = time.perf_counter() - began
            each = seconds / len(source) * 1e6
            print(f"| {len(source):,} | {seconds:.1f} | {each:.1f} |", flush=True)


if __name__ == "__main__":
    main()
