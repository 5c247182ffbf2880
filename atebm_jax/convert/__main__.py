"""PyTorch checkpoints in, weights out.

    python -m atebm_jax.convert --from=FILE --to=DIR
    python -m atebm_jax.convert --from=WORKDIR --export=safetensors --to=FILE

Exit codes: 0 done; 2 a mistake in flags or files, said in one sentence.
"""

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from atebm_jax.command_line import Parser, check_platform, quiet_libraries, run
from atebm_jax.errors import UserError
from atebm_jax.progress import say

if TYPE_CHECKING:
    from atebm_jax.convert.importing import Imported
    from atebm_jax.convert.matching import Match

# Of the fixed image: the network's features of a larger one take tens of gigabytes.
_LARGEST_SIDE = 4096
# Logits that are shown; all are in import.json.
_SHOWN_LOGITS = 10


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m atebm_jax.convert",
        description="Reads PyTorch checkpoints without running anything in them, and "
        "writes weights back with PyTorch's names.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="FILE",
        help=".pt, .pth, .ckpt, .tar or .safetensors; with --export a workdir or "
        "checkpoint of this project",
    )
    parser.add_argument("--to", required=True, help="new folder; with --export a file")
    parser.add_argument("--arch", default="auto", help="resnet50, say; default auto")
    parser.add_argument("--entry", help="which of several networks in the file")
    parser.add_argument("--mean", help="input normalisation: one number a channel")
    parser.add_argument("--std", help="with --mean")
    parser.add_argument(
        "--normalization",
        help="imagenet, cifar10 or none: needed where no file says it and networks of "
        "the kind differ",
    )
    parser.add_argument(
        "--activation", help="relu (default), silu (swish) or gelu: no file says it"
    )
    parser.add_argument("--image_size", type=int, help="side of the images in pixels")
    parser.add_argument(
        "--classes_file", help="names of the classes, one a line: no file says them"
    )
    parser.add_argument("--export", help="safetensors: PyTorch's names and layouts")
    parser.add_argument("--verbose", action="store_true", help="list every parameter")
    return parser


def main(argv: Sequence[str], console: Console | None = None) -> None:
    """Runs the command.

    Args:
      argv: arguments without the program's name.
      console: where to print; default the terminal.

    Raises:
      UserError: a mistake in flags or files.
    """
    flags = _parser().parse_args(argv)
    console = console or Console()
    quiet_libraries()
    check_platform()
    if flags.export is not None:
        _export(flags, console)
    else:
        _import(flags, console)


def _export(flags: argparse.Namespace, console: Console) -> None:
    from atebm_jax.convert import exporting

    made = exporting.export(flags.source, flags.to, kind=flags.export)
    say(
        console,
        f"{made.num_arrays} arrays with {made.num_parameters:,} numbers "
        f"({made.metadata['atebm_jax.arch']}) are in {flags.to}",
    )
    mean = made.metadata["atebm_jax.mean"]
    if mean != "[]":
        say(
            console,
            f"they expect normalised images: mean {mean}, std "
            f"{made.metadata['atebm_jax.std']} (in the file's metadata)",
        )


def _import(flags: argparse.Namespace, console: Console) -> None:
    # Imported late, so that --help answers at once.
    from atebm_jax.convert import importing, normalization

    if flags.image_size is not None and not 1 <= flags.image_size <= _LARGEST_SIDE:
        raise UserError(
            f"--image_size={flags.image_size}: it must be positive, "
            f"{_LARGEST_SIDE} pixels at most."
        )
    asked = normalization.parse(flags.normalization, flags.mean, flags.std)
    importing.check_target(flags.to)
    made = importing.read(
        flags.source,
        arch=flags.arch,
        entry=flags.entry,
        asked=asked,
        activation=flags.activation,
        image_size=flags.image_size,
    )
    if flags.classes_file is not None:
        made = importing.with_class_names(made, flags.classes_file)
    importing.write(made, flags.to)
    _show(console, made, flags.verbose)
    say(console, f"the checkpoint is in {flags.to}")


def _show(console: Console, made: "Imported", verbose: bool) -> None:
    record, model = made.record, made.config.model
    say(console, f"{record['source']}, SHA-256 {record['sha256']}")
    for step in record["unwrapped"]:
        say(console, f"  {step}")
    normal = record["normalization"]
    numbers = (
        f"mean {normal['mean']}, std {normal['std']}" if normal["mean"] else "none"
    )
    say(
        console,
        f"{record['arch']}, {model.num_classes} classes; input normalisation: "
        f"{numbers} ({normal['origin']})",
    )
    for assumption in record["assumed"]:
        say(console, f"ASSUMED {assumption}")
    console.print(_table(made.matches, verbose))
    say(
        console,
        f"all {record['arrays_matched']} arrays with {record['numbers_matched']:,} "
        "numbers matched; none missing, none left over",
    )
    probe = record["probe"]
    shown = " ".join(f"{x:.5f}" for x in probe["logits"][:_SHOWN_LOGITS])
    more = " ..." if len(probe["logits"]) > _SHOWN_LOGITS else ""
    side = " x ".join(map(str, probe["image_shape"]))
    say(console, f"logits of the fixed image ({side}): {shown}{more}")


def _table(matches: "list[Match]", verbose: bool) -> Table:
    if verbose:
        table = Table()
        for title in ("PyTorch", "shape", "here"):
            table.add_column(title, overflow="fold")
        for row in matches:
            table.add_row(Text(row.name), Text(str(row.shape)), Text(row.path))
        return table
    table = Table("PyTorch", "arrays", "numbers")
    groups: dict[str, list[int]] = {}
    for row in matches:
        first = row.name.partition(".")[0]
        groups.setdefault(first, []).append(math.prod(row.shape))
    for name, sizes in groups.items():
        table.add_row(Text(name), str(len(sizes)), f"{sum(sizes):,}")
    return table


def cli() -> None:
    """Entry point of the command line."""
    run(main, stopped="nothing was written")


if __name__ == "__main__":
    cli()
