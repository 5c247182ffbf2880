"""The rows of a GPU, each against PyTorch: what to run where one is at hand.

    python benchmarks/gpu.py --out=FOLDER

Every row is one `step.py` command, printed before it runs: stage-2 step and contrastive
loop (sampling is that loop, with steps of another size) in bfloat16, PyTorch in
autocast, `channels_last` and compiled. A row whose record is in the folder already is
not run again, so that the same command goes on where it was cut off. `--rehearse` runs
the same commands with tiny networks' sizes on a CPU.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import options
from rich.console import Console
from rich.table import Table

from atebm_jax.errors import UserError

STEP = Path(__file__).with_name("step.py")
_CONFIGS = Path(__file__).parents[1] / "configs"

# Config, images of each stream a step, T of the loop. Batches leave room for both
# frameworks on one card of 80 GiB (docs/cost.md has the memory of a row).
ROWS: dict[str, tuple[str, int, int]] = {
    "wrn34_10": ("cifar10.py:wrn34_10_t50", 128, 20),
    "resnet50": ("imagenet256.py:resnet50_t30", 64, 14),
    "convnext_large": ("imagenet256.py:convnext_large_t110", 16, 36),
}
# In a rehearsal: the network of the same family, pixels a side.
TINY = {
    "wrn34_10": ("10/1", 8),
    "resnet50": ("resnet50", 32),
    "convnext_large": ("convnext_tiny_cvst", 32),
}


def parser() -> options.Parser:
    flags = options.Parser(description=__doc__.partition("\n")[0])
    flags.add_argument("--out", required=True, metavar="FOLDER", help="of the records")
    flags.add_argument("--rows", default=",".join(ROWS), help="some of the rows")
    flags.add_argument("--repeats", type=options.positive, default=10)
    flags.add_argument(
        "--rehearse", action="store_true", help="tiny, on a CPU: times mean nothing"
    )
    return flags


def command(row: str, path: Path, repeats: int, rehearse: bool) -> list[str]:
    """The `step.py` command of a row."""
    config, batch, steps = ROWS[row]
    arguments = [f"--config={_CONFIGS / config}", "--peak", f"--json={path}"]
    if rehearse:
        network, size = TINY[row]
        arguments += [f"--model={network}", f"--image_size={size}", "--batch_size=2"]
        arguments += ["--steps=2", "--repeats=1", "--dtype=float32"]
        arguments.append("--config.stage2.adversary.num_steps=1")
    else:
        arguments += [f"--batch_size={batch}", f"--steps={steps}", "--device=gpu"]
        arguments += [f"--repeats={repeats}", "--dtype=bfloat16", "--torch_compile"]
    return [sys.executable, str(STEP), *arguments]


def show(records: dict[str, dict[str, Any]]) -> None:
    """One table of all rows."""
    table = Table()
    for title in ("", "images a second", "PyTorch's", "ratio", "share of the peak"):
        table.add_column(title, justify="right" if title else "left")
    for row, record in records.items():
        batch = record["flags"]["batch_size"]
        for what, summary in record["summary"].items():
            seconds = [summary[side]["wall_s"]["median"] for side in ("ours", "torch")]
            share = f"{100 * record['peak']['share']:.0f} %" if what == "loop" else ""
            speeds = [f"{batch / value:,.4g}" for value in seconds]
            ratio = f"{summary['ratio']['wall_s']['median']:.2f}"
            table.add_row(f"{row}, {what}", *speeds, ratio, share)
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def main(argv: list[str]) -> None:
    flags = parser().parse_args(argv)
    rows = flags.rows.split(",")
    unknown = sorted(set(rows) - set(ROWS))
    if unknown:
        raise UserError(
            f"there is no row {', '.join(unknown)}: choose among {', '.join(ROWS)}."
        )
    folder = Path(flags.out)
    folder.mkdir(parents=True, exist_ok=True)
    records, failed = {}, []
    for row in rows:
        path = folder / f"{row}.json"
        if not path.exists():
            arguments = command(row, path, flags.repeats, flags.rehearse)
            print(shlex.join(arguments), flush=True)
            if subprocess.run(arguments, check=False).returncode != 0:
                failed.append(row)
                continue
        records[row] = json.loads(path.read_text())
    show(records)
    if failed:
        raise UserError(f"no record of {', '.join(failed)}: the same command goes on.")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as mistake:
        options.fail(mistake)
