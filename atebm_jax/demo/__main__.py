"""The command: `python -m atebm_jax.demo --workdir=zoo:cifar10` opens a page.

Exit codes: 0 finished; 2 a mistake in flags, checkpoint or data, said in one sentence;
130 or 143 stopped by a signal.
"""

import importlib.metadata
import os
import re
from collections.abc import Sequence

from rich.console import Console

from atebm_jax.command_line import Parser, check_platform, quiet_libraries, run
from atebm_jax.errors import UserError
from atebm_jax.progress import say

# The oldest version of Gradio with which the page works, also without the internet.
_GRADIO = "6.20"


def _parser() -> Parser:
    parser = Parser(
        prog="python -m atebm_jax.demo",
        description="Opens a page in the browser: samples, explanations, edits, "
        "attacks and energies of a trained model.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workdir", default="zoo:cifar10", help="workdir, checkpoint or zoo:NAME")
    add("--plain", help="a plainly trained network, to be attacked beside it")
    add("--data", help="data set of the examples; default the config's test set")
    add("--data_dir", default="", help="where TFDS data sets lie")
    add("--host", default="127.0.0.1", help="0.0.0.0 for the whole network")
    add("--port", type=int, help="default: the first free one from 7860 on")
    add("--share", action="store_true", help="a public address by Gradio's servers")
    return parser


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _check_gradio() -> None:
    try:
        version = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        here = "which is missing"
    else:
        if _numbers(version) >= _numbers(_GRADIO):
            return
        here = f"and {version} is here"
    raise UserError(
        f"the page needs the package gradio, version {_GRADIO} or newer, {here}: "
        "pip install 'atebm_jax[demo]'."
    )


def main(arguments: Sequence[str], console: Console | None = None) -> None:
    """Opens the page, until a signal comes.

    Raises:
      UserError: a flag, a checkpoint or the data cannot be used, or Gradio is missing
        or too old.
    """
    console = console or Console()
    flags = _parser().parse_args(arguments)
    _check_gradio()
    # Before Gradio is imported, which reads it there.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from atebm_jax.demo import page
    from atebm_jax.demo.answers import Answers

    check_platform()
    answers = Answers(
        flags.workdir,
        console,
        plain=flags.plain,
        source=flags.data,
        data_dir=flags.data_dir,
    )
    blocks = page.launch(
        answers,
        host=flags.host,
        port=flags.port,
        share=flags.share,
        quiet=True,
        prevent_thread_lock=True,
    )
    say(
        console,
        f"the page is at {blocks.share_url or blocks.local_url}; Ctrl-C ends it",
    )
    blocks.block_thread()


def cli() -> None:
    """Entry point of the command line."""
    quiet_libraries()
    run(main, stopped="the page is closed")


if __name__ == "__main__":
    cli()
