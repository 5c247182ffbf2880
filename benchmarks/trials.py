"""Stage 2 from one stage 1 with each of several settings: what learns and what dies.

    python benchmarks/trials.py --config=configs/cifar10.py:hour \\
        --init_from=runs/hour/checkpoints/stage1 --workdir=runs/trials --num_steps=40 \\
        --learning_rates=1e-4,3e-4,1e-3,3e-3,1e-2 --seeds=gaussian \\
        --config.data.data_dir=TFDS_FOLDER

Each combination is a job of its own below --workdir, so that the command goes on where
it was stopped. What is printed comes from the jobs' `metrics.jsonl` and `report.json`.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import options
from etils import epath
from ml_collections import ConfigDict
from rich.console import Console

from atebm_jax import UserError, compilation, job
from atebm_jax.metric_writer import read_metrics

COLUMNS = (
    "seeds",
    "learning rate",
    "warm-up",
    "T",
    "AUC",
    "CE",
    "adversarial accuracy",
)
COLUMNS += ("largest gradient", "clean", "robust", "distance")


def main(argv: Sequence[str]) -> None:
    """Runs the trials one after the other, and prints a row of the table after each."""
    flags, config = options.parse(_parser(), argv)
    compilation.use_cache("workdir", flags.workdir)
    _print(COLUMNS)
    _print(["---"] * len(COLUMNS))
    for seeds, rate, warmup in itertools.product(
        flags.seeds, flags.learning_rates, flags.warmup_steps
    ):
        described = [seeds, f"{rate:g}", str(warmup)]
        folder = Path(flags.workdir) / "_".join(described).replace(":", "_")
        settings = _settings(flags, config, seeds, rate, warmup)
        try:
            report = job.run(settings, folder, console=Console(file=sys.stderr))
        except UserError as error:
            _print([*described, str(error)])
            continue
        records = read_metrics(epath.Path(folder))
        _print([*described, *_row(records, report["stages"]["stage2"])])


def _print(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def _parser() -> options.Parser:
    parser = options.Parser(description=__doc__)
    add = parser.add_argument
    add("--init_from", required=True, help="checkpoint of stage 1")
    add("--workdir", required=True, help="the trials are kept below")
    add("--num_steps", type=options.positive, default=40)
    add("--seeds", type=options.listed(str), default=["gaussian"])
    add("--learning_rates", type=options.listed(float), default=[1e-3])
    add("--warmup_steps", type=options.listed(int), default=[0])
    return parser


def _settings(
    flags: argparse.Namespace, config: ConfigDict, seeds: str, rate: float, warmup: int
) -> ConfigDict:
    settings = ConfigDict(config.to_dict())
    settings.update_from_flattened_dict(
        {
            "stages": "stage2",
            "init_from": flags.init_from,
            "data.seeds": seeds,
            "stage2.num_epochs": 0.0,
            "stage2.num_steps": flags.num_steps,
            "stage2.learning_rate": rate,
            "stage2.warmup_steps": warmup,
            "log_every_steps": 1,
        }
    )
    return settings


def _row(records: Sequence[dict[str, Any]], figures: dict[str, Any]) -> list[str]:
    steps = [record for record in records if "gradient_norm" in record]
    last = steps[-10:]

    def mean(name: str) -> float:
        return sum(record[name] for record in last) / len(last)

    return [
        f"{steps[-1]['T']:.0f}",
        f"{mean('auc'):.2f}",
        f"{mean('loss_ce'):.2f}",
        f"{mean('accuracy_adv'):.2f}",
        f"{max(record['gradient_norm'] for record in steps):.1f}",
        f"{figures['clean_accuracy']:.3f}",
        f"{figures['robust_accuracy']:.3f}",
        f"{figures['sample_distance']:.1f}",
    ]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        options.fail(error)
