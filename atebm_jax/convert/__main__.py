"""PyTorch checkpoints in, weights out.

    python -m atebm_jax.convert --list
    python -m atebm_jax.convert --from=FILE --to=DIR
    python -m atebm_jax.convert --from=WORKDIR --export=safetensors --to=FILE

Exit codes: 0 done; 2 a mistake in flags or files, said in one sentence.
"""

import argparse
import collections
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from atebm_jax.command_line import Parser, check_platform, quiet_libraries, run
from atebm_jax.errors import UserError, check_choice
from atebm_jax.progress import say

if TYPE_CHECKING:
    from atebm_jax.convert.importing import Imported

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
    add = parser.add_argument
    add(
        "--from",
        dest="source",
        metavar="FILE",
        help=".pt, .pth, .ckpt, .tar or .safetensors; with --export a workdir or "
        "checkpoint of this project",
    )
    add("--to", help="new folder; with --export a file")
    add("--list", action="store_true", help="print the networks that can be read")
    add("--arch", default="auto", help="resnet50, say; default auto")
    add("--entry", help="which of several networks in the file")
    add("--mean", help="input normalisation: one number a channel")
    add("--std", help="with --mean")
    add(
        "--normalization",
        help="imagenet, cifar10, none or per_image (or give --mean and --std): needed "
        "where no file says it and networks of the kind differ",
    )
    add("--activation", help="relu, silu (swish) or gelu: no file says it")
    add("--image_size", type=int, help="side of the images in pixels")
    add("--classes_file", help="names of the classes, one a line: no file says them")
    add("--export", help="safetensors: PyTorch's names and layouts")
    add("--verbose", action="store_true", help="list every parameter")
    return parser


def main(argv: Sequence[str], console: Console | None = None) -> None:
    """Runs the command, by its arguments without the program's name.

    Raises:
      UserError: a mistake in flags or files.
    """
    parser = _parser()
    flags = parser.parse_args(argv)
    if not flags.list and None in (flags.source, flags.to):
        parser.error("--from and --to are required, or --list")
    console = console or Console()
    quiet_libraries()
    check_platform()
    # Imported late, so that --help answers at once.
    from atebm_jax.convert import exporting

    if flags.list:
        _list(console)
    elif flags.export is not None:
        check_choice("--export", flags.export, ("safetensors",))
        for line in exporting.export(flags.source, flags.to):
            say(console, line)
    else:
        _import(flags, console)


def _list(console: Console) -> None:
    from atebm_jax import models
    from atebm_jax.convert import names, normalization

    rows = []
    for family, torch, marks in names.families():
        known = {
            "--arch": " ".join(models.FAMILIES[family].archs),
            "recognised by": " or ".join(sorted(marks)),
            "input normalisation": normalization.expected(family),
            "published": torch.published,
        }
        lines = (f"{what}: {text}" for what, text in known.items() if text)
        rows.append((family, "\n".join(lines)))
    console.print(_table(("family", "what is known of it"), rows, show_lines=True))
    say(
        console,
        "Mean and std that a file holds are used, whatever the family; where it holds "
        "none, the normalisation is as the table says.",
    )


def _import(flags: argparse.Namespace, console: Console) -> None:
    from atebm_jax import storage
    from atebm_jax.convert import importing, normalization

    if flags.image_size is not None and not 1 <= flags.image_size <= _LARGEST_SIDE:
        raise UserError(
            f"--image_size={flags.image_size}: it must be positive, "
            f"{_LARGEST_SIDE} pixels at most."
        )
    asked = normalization.parse(flags.normalization, flags.mean, flags.std)
    storage.check_new_folder("--to", flags.to)
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
    from atebm_jax.convert.normalization import Normalization, described

    record, normal = made.record, made.record["normalization"]
    fields = ("mean", "std", "origin", "by_image")
    chosen = Normalization(**{field: normal[field] for field in fields})
    logits = record["probe"]["logits"]
    shown = " ".join(f"{x:.5f}" for x in logits[:_SHOWN_LOGITS])
    more = " ..." if len(logits) > _SHOWN_LOGITS else ""
    side = " x ".join(map(str, record["probe"]["image_shape"]))
    say(console, f"{record['source']}, SHA-256 {record['sha256']}")
    for step in record["unwrapped"]:
        say(console, f"  {step}")
    say(
        console,
        f"{record['arch']}, {made.config.model.num_classes} classes; input "
        f"normalisation: {described(chosen)} ({chosen.origin})",
    )
    for assumption in record["assumed"]:
        say(console, f"ASSUMED {assumption}")
    if verbose:
        console.print(_table(("PyTorch", "shape", "here"), made.matches))
    else:
        sizes: dict[str, list[int]] = collections.defaultdict(list)
        for match in made.matches:
            sizes[match.name.partition(".")[0]].append(math.prod(match.shape))
        rows = ((name, len(found), f"{sum(found):,}") for name, found in sizes.items())
        console.print(_table(("PyTorch", "arrays", "numbers"), rows))
    say(
        console,
        f"all {record['arrays_matched']} arrays with {record['numbers_matched']:,} "
        "numbers matched; none missing, none left over",
    )
    say(console, f"logits of the fixed image ({side}): {shown}{more}")


def _table(titles: Sequence[str], rows: Iterable[Iterable], **options: Any) -> Table:
    table = Table(**options)
    for title in titles:
        table.add_column(title, overflow="fold")
    for cells in rows:
        table.add_row(*(Text(str(cell)) for cell in cells))
    return table


if __name__ == "__main__":
    run(main, stopped="nothing was written")
