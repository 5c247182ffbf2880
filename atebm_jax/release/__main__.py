"""The command: `python -m atebm_jax.release --workdir=runs/digits --out=DIR`.

Exit codes: 0 done; 2 a mistake in flags, checkpoint or report, said in one sentence.
"""

from collections.abc import Sequence

from rich.console import Console

from atebm_jax.command_line import Parser, check_platform, quiet_libraries, run
from atebm_jax.errors import check_choice
from atebm_jax.progress import say

_LICENSE = "apache-2.0"


def _parser() -> Parser:
    parser = Parser(
        prog="python -m atebm_jax.release",
        description="Writes a folder that others can load, here or from a model hub: "
        "weights, config, model card, figures and licence.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workdir", required=True, help="workdir, or one of its checkpoints")
    add("--best_by", help="robust_accuracy or sample_distance: that checkpoint")
    add("--out", required=True, help="new folder")
    add(
        "--dtype",
        default="float32",
        help="of the weights in the file, float32 or float16, which takes half the "
        "space and rounds; default float32",
    )
    add("--name", help="title of the model card; default the folder's name")
    add("--command", help="what trained the weights, for the model card")
    add(
        "--evaluation",
        help="folder of an evaluation of this checkpoint, for the figures; default "
        "WORKDIR/evaluation where it is there; none for no figures",
    )
    add(
        "--license",
        help=f"of the weights, as model hubs abbreviate it; default {_LICENSE} for "
        "weights that were trained here",
    )
    add("--license_file", help=f"its text; needed for another than {_LICENSE}")
    add(
        "--stablehlo",
        action="store_true",
        help="add programs that run with JAX alone, without this package: logits, "
        "energy and the sampler",
    )
    return parser


def main(arguments: Sequence[str], console: Console | None = None) -> None:
    """Writes the release that the flags describe.

    Raises:
      UserError: a flag, the checkpoint or its report cannot be used.
    """
    flags = _parser().parse_args(arguments)
    quiet_libraries()
    check_platform()
    # Imported late, so that --help answers at once.
    from atebm_jax import checkpoint, release_format, storage, trained
    from atebm_jax.release import licences, writing

    check_choice("--dtype", flags.dtype, release_format.DTYPES)
    storage.check_new_folder("--out", flags.out)
    folder = checkpoint.find(flags.workdir, best_by=flags.best_by)
    loaded = trained.load(folder)
    license_ = licences.choose(
        flags.license,
        flags.license_file,
        loaded,
        _LICENSE,
        released=release_format.is_release(folder),
    )
    lines = writing.write(
        loaded,
        flags.out,
        evaluation=writing.evaluation_of(flags.workdir, flags.evaluation),
        license_=license_,
        name=flags.name,
        command=flags.command,
        dtype=flags.dtype,
        programs_too=flags.stablehlo,
    )
    for line in lines:
        say(console or Console(), line)


if __name__ == "__main__":
    run(main, stopped="nothing was written")
