"""The command: `python -m atebm_jax.sample --workdir=runs/digits --out=DIR`.

Also `... explain IMAGE --target=CLASS` and `... edit IMAGE --task=TASK`.

Exit codes: 0 finished; 2 a mistake in flags, checkpoint or data, said in one sentence;
130 or 143 stopped by a signal. The same command then goes on.
"""

from collections.abc import Sequence

from rich.console import Console

from atebm_jax.command_line import check_platform, quiet_libraries, run
from atebm_jax.sample import flags


def main(arguments: Sequence[str], console: Console | None = None) -> None:
    """Draws, explains or edits as the flags say.

    Raises:
      UserError: a flag, the checkpoint, an image or the folder cannot be used.
    """
    console = console or Console()
    parsers = {"explain": flags.of_explain, "edit": flags.of_edit}
    command = next((word for word in arguments[:1] if word in parsers), None)
    parser = parsers[command]() if command else flags.of_sampling()
    given = parser.parse_args(arguments[1:] if command else arguments)
    check_platform()
    # Imported late, so that --help and a misspelt flag answer at once.
    from atebm_jax.sample import draw, edit

    if command:
        edit.run(command, given, console)
    else:
        draw.run(given, console)


def cli() -> None:
    """Entry point of the command line."""
    quiet_libraries()
    run(main, stopped="the same command goes on")


if __name__ == "__main__":
    cli()
