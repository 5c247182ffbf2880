"""The rows of a GPU, each against PyTorch: what to run where one is at hand.

    python benchmarks/gpu.py --out=FOLDER

Every row is one `step.py` command, printed before it runs: stage-2 step and contrastive
loop (sampling is that loop, with steps of another size) in bfloat16, PyTorch in
autocast, `channels_last` and compiled. A row whose record is in the folder already is
not run again, so that the same command goes on where it was cut off. `--rehearse` runs
the same commands with tiny networks' sizes on a CPU.

Beside what was measured the table has what the compiler says of the same row, card and
number of images (docs/targets.json): a bound of the speed, and peak memory, which is
without the workspace of convolutions. The measured peak is of all that ran.
"""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import options
from rich.console import Console
from rich.table import Table

from atebm_jax import target_costs
from atebm_jax.command_line import load_config
from atebm_jax.dry_run import GIB
from atebm_jax.errors import UserError
from atebm_jax.stages import CONTRASTIVE

STEP = Path(__file__).with_name("step.py")
_ROOT = Path(__file__).parents[1]
_CONFIGS, _COMPILED = _ROOT / "configs", _ROOT / "docs" / "targets.json"

# Config, images of each stream a step, T of the loop. Batches leave room for both
# frameworks on one card of 80 GiB (docs/cost.md has the memory of a row).
ROWS: dict[str, tuple[str, int, int]] = {
    "wrn34_10": ("cifar10.py:wrn34_10_t50", 128, 20),
    "resnet50": ("imagenet256.py:resnet50_t30", 64, 14),
    "convnext_tiny": ("imagenet256.py:convnext_tiny", 64, 36),
    "convnext_large": ("imagenet256.py:convnext_large_t110", 16, 36),
}
# In a rehearsal: the network of the same family, pixels a side.
TINY = {
    "wrn34_10": ("10/1", 8),
    "resnet50": ("resnet50", 32),
    "convnext_tiny": ("convnext_tiny_cvst", 32),
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


def compiled(row: str, record: dict[str, Any]) -> dict[str, Any] | None:
    """What docs/targets.json has of this row and card, with as many images on it.

    Best of one card, else of one of several; nothing of a program in another dtype.
    """
    config = load_config(f"{_CONFIGS / ROWS[row][0]}")
    if config.model.dtype != record["model"]["dtype"]:
        return None  # compiled as the row has it, and measured in another
    device = record["sides"]["ours"]["device"].lower()
    kept = options.read_json(_COMPILED).items()
    for name, figures in sorted(kept, key=lambda entry: entry[1]["devices"]):
        same_row = name.split()[0] == ROWS[row][0].replace(".py", "")
        kind = figures["target"].partition(":")[0]
        share = figures["batch_size"] / figures["devices"]
        same_share = share == record["flags"]["batch_size"]
        if same_row and kind in device and same_share and "seconds" in figures:
            return figures
    return None


def bounds(figures: dict[str, Any], record: dict[str, Any]) -> dict[str, float]:
    """Images a second that the compiled loop and step are bound by, at the record's T.

    Those of `target_costs`: FLOPs and bytes of each kernel, at the peaks of the card.
    """
    seconds, steps = figures["seconds"], record["flags"]["steps"]
    inner = record["stage2"]["adversary"]["num_steps"]
    turns = {CONTRASTIVE: steps, "adversary step": inner}
    taken = {
        "loop": steps * seconds[CONTRASTIVE],
        "step": target_costs.whole(seconds, turns),
    }
    return {name: record["flags"]["batch_size"] / taken[name] for name in taken}


def show(records: dict[str, dict[str, Any]]) -> None:
    """One table of all rows, beside what their programs were compiled to."""
    table = Table()
    titles = ["", "images a second", "PyTorch's", "ratio", "share of the peak"]
    titles += ["compiled bound", "peak GiB", "compiled GiB"]
    for title in titles:
        table.add_column(title, justify="right" if title else "left")
    for row, record in records.items():
        batch, figures = record["flags"]["batch_size"], compiled(row, record)
        bound = bounds(figures, record) if figures else {}
        peak = record["sides"]["ours"].get("peak_bytes")
        for what, summary in record["summary"].items():
            seconds = [summary[side]["wall_s"]["median"] for side in ("ours", "torch")]
            share = f"{100 * record['peak']['share']:.0f} %" if what == "loop" else ""
            speeds = [f"{batch / value:,.4g}" for value in seconds]
            ratio = f"{summary['ratio']['wall_s']['median']:.2f}"
            cells = [f"{row}, {what}", *speeds, ratio, share]
            cells.append(f"{bound[what]:,.4g}" if bound else "")
            if what == "step":
                cells.append(f"{peak / GIB:.1f}" if peak else "")
                needed = figures["memory_bytes"]["peak"] / GIB if figures else None
                cells.append(f"{needed:.1f}" if needed else "")
            table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


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
        records[row] = options.read_json(path)
    show(records)
    if failed:
        raise UserError(f"no record of {', '.join(failed)}: the same command goes on.")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as mistake:
        options.fail(mistake)
