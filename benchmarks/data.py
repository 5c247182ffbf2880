"""Images a second of the input pipeline: training batches and evaluation batches.

    python benchmarks/data.py --config=configs/cifar10.py:small \\
        --config.data.data_dir=TFDS_FOLDER --workers=0,2

Training draws the classifier's stream, the one with the strong augmentation, as
training does; the network is not involved. Wall time, since worker processes count.
"""

import itertools
import sys
import time
from typing import Any

import options
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from atebm_jax import data
from atebm_jax.errors import UserError

# Batches that may lie ready before the clock starts, of each worker.
PREFETCH = 8


def parser() -> options.Parser:
    flags = options.Parser(description=__doc__.partition("\n")[0])
    flags.add_argument("--workers", default="0,2", help="worker processes to compare")
    flags.add_argument("--batch_size", type=options.positive, default=128)
    flags.add_argument("--images", type=options.positive, default=5000)
    flags.add_argument("--repeats", type=options.positive, default=3)
    flags.add_argument("--json", default="", metavar="PATH", help="write all repeats")
    return flags


def main(argv: list[str]) -> None:
    flags, config = options.parse(parser(), argv)
    counts = flags.workers.split(",")
    if not all(count.isdecimal() for count in counts):
        raise UserError(
            f"--workers={flags.workers} is no list of counts: write --workers=0,2."
        )
    rows = {
        **{f"train, {count} workers": int(count) for count in counts},
        "evaluation": None,
    }
    speeds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(flags.repeats):
        for name, workers in rows.items():
            speeds[name].append(images_per_second(config, flags, workers))
    record = {
        "command": options.command(),
        "machine": options.machine(),
        "flags": vars(flags),
        "data": config.data.to_dict(),
        "images_per_second": speeds,
        "summary": {name: options.quartiles(values) for name, values in speeds.items()},
    }
    options.write_json(flags.json, record)
    show(record)


def images_per_second(config: ConfigDict, flags: Any, workers: int | None) -> float:
    """Speed of the training stream, or of evaluation where `workers` is None."""
    settings = config.data
    if workers is None:
        batches, skipped = _evaluation(settings, flags), PREFETCH
    else:
        batches = _training(settings, flags, workers)
        # What was made ahead while nobody looked would flatter the speed.
        skipped = PREFETCH * max(workers, 1)
    with batches:
        for _ in itertools.islice(batches, skipped):
            pass
        start, count = time.perf_counter(), 0
        for batch in itertools.islice(batches, -(-flags.images // flags.batch_size)):
            count += _images(batch)
        seconds = time.perf_counter() - start
    if not count:
        raise UserError(
            f"{settings.eval} has no more than {PREFETCH} batches of "
            f"{flags.batch_size} images: choose a smaller --batch_size."
        )
    return count / seconds


def _images(batch: dict[str, Any]) -> int:
    return int(batch["mask"].sum()) if "mask" in batch else len(batch["x_cls"])


def _training(settings: ConfigDict, flags: Any, workers: int) -> data.Batches:
    source = data.open_source(settings.train, settings.data_dir)
    return data.train_batches(
        {"cls": data.Stream(source, settings.augment_cls)},
        batch_size=flags.batch_size,
        image_shape=tuple(settings.image_shape),
        num_workers=workers,
        num_threads=settings.num_threads,
        prefetch=PREFETCH,
    )


def _evaluation(settings: ConfigDict, flags: Any) -> data.Batches:
    source = data.open_source(settings.eval, settings.data_dir)
    return data.eval_batches(
        source,
        preprocess=settings.preprocess,
        batch_size=flags.batch_size,
        image_shape=tuple(settings.image_shape),
        num_threads=settings.num_threads,
        prefetch=PREFETCH,
    )


def show(record: dict[str, Any]) -> None:
    """Prints the data set, the augmentation and one table."""
    settings, flags = record["data"], record["flags"]
    console = Console(
        width=None if sys.stdout.isatty() else 120, highlight=False, markup=False
    )
    machine = record["machine"]
    console.print(f"{machine['cpu']}, {machine['cpus']} CPUs")
    console.print(
        f"{settings['train']}, {settings['augment_cls'] or 'no augmentation'}, batch "
        f"{flags['batch_size']}, {settings['num_threads']} threads (in each worker)"
    )
    table = Table()
    table.add_column("")
    for title in ("images / s", "quartiles"):
        table.add_column(title, justify="right")
    for name, speed in record["summary"].items():
        spread = f"[{speed['q1']:,.0f}, {speed['q3']:,.0f}]"
        table.add_row(name, f"{speed['median']:,.0f}", spread)
    console.print(table)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as mistake:
        options.fail(mistake)
