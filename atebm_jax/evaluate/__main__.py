"""The command: `python -m atebm_jax.evaluate --workdir=runs/digits --metrics=all`.

Exit codes: 0 finished; 2 a mistake in flags, config, data or checkpoint, said in one
sentence; 130 or 143 stopped by a signal. The same command then goes on.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags
from rich.console import Console

from atebm_jax import command_line
from atebm_jax.errors import UserError
from atebm_jax.evaluate.options import Options
from atebm_jax.local_path import beside

# Of this command alone: several may be imported side by side.
_FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file(
    "config",
    None,
    "Data and evaluation settings other than the checkpoint's own.",
    flag_values=_FLAGS,
)
flags.DEFINE_list(
    "metrics", ["all"], "all, or some of the metrics' names.", flag_values=_FLAGS
)
flags.DEFINE_list(
    "compare",
    [],
    "Folders of finished evaluations, FOLDER or NAME=FOLDER, to show side by side in "
    "--out/report.html.",
    flag_values=_FLAGS,
)
flags.DEFINE_bool(
    "classes_by_place",
    False,
    "Class k of the data is class k of the network, whatever their names.",
    flag_values=_FLAGS,
)
for _name, _text in {
    "workdir": "Workdir, release, or name (hf:OWNER/NAME, zoo:NAME) of the model.",
    "checkpoint": "Instead of --workdir: a stage's or a step's folder.",
    "out": "Default: WORKDIR/evaluation; of zoo:NAME zoo_NAME/evaluation.",
    "best_by": "robust_accuracy or sample_distance: that checkpoint.",
    "data_dir": "Where TFDS data sets lie.",
    "judge": "Checkpoint of an independent classifier, or efficientnet_lite0.",
    "coordinator": "HOST:PORT of process 0, for several processes outside TPU pods "
    "and Slurm.",
}.items():
    flags.DEFINE_string(_name, None, _text, flag_values=_FLAGS)
for _name in ("num_processes", "process_id"):
    flags.DEFINE_integer(_name, None, "With --coordinator.", flag_values=_FLAGS)

_DEFINE: dict[Any, Any] = {
    int: flags.DEFINE_integer,
    bool: flags.DEFINE_bool,
    str: flags.DEFINE_string,
    str | None: flags.DEFINE_string,
    float | None: flags.DEFINE_float,
    Sequence[str]: flags.DEFINE_list,
    Sequence[float]: flags.DEFINE_list,
}
# Flags of the fields of Options.
_OPTIONS = {
    "autoattack_version" if field.name == "version" else field.name: field
    for field in dataclasses.fields(Options)
    if field.metadata
}
for _name, _field in _OPTIONS.items():
    _default = _field.default
    if isinstance(_default, tuple):
        _default = [x if isinstance(x, str) else f"{x:g}" for x in _default]
    _text = _field.metadata["help"]
    _DEFINE[_field.type](_name, _default, _text, flag_values=_FLAGS)


def main(argv: Sequence[str]) -> None:
    """Runs the evaluation that the flags describe."""
    del argv
    if _FLAGS.compare:
        return command_line.run(lambda _: _compare(), stopped="nothing was written")
    out = _FLAGS.out or f"{beside(_FLAGS.workdir)}/evaluation"
    kept = f"what is finished is kept in {out}; the same command goes on"
    command_line.run(lambda _: _evaluate(out), stopped=kept)


def _evaluate(out: str) -> None:
    # Imported late, so that --help and a misspelt flag answer at once.
    import jax

    from atebm_jax.evaluate import report, suite
    from atebm_jax.progress import parts, say
    from atebm_jax.sharding import initialize_processes

    command_line.quiet_libraries()
    options = _options()
    initialize_processes(_FLAGS.coordinator, _FLAGS.num_processes, _FLAGS.process_id)
    command_line.check_platform()
    # One report from all processes.
    console = Console(quiet=jax.process_index() != 0)
    metrics = _FLAGS.metrics
    with parts(console) as show:
        result = suite.evaluate(
            _FLAGS.checkpoint or _FLAGS.workdir,
            out,
            metrics=tuple(suite.METRICS) if metrics == ["all"] else metrics,
            config=_FLAGS.config,
            best_by=_FLAGS.best_by,
            data_dir=_FLAGS.data_dir,
            judge=_FLAGS.judge,
            classes_by_place=_FLAGS.classes_by_place,
            options=options,
            show=show,
        )
    report.show_figures(console, result)
    say(console, f"report and plots are in {out}")


def _compare() -> None:
    from atebm_jax import storage
    from atebm_jax.evaluate import html
    from atebm_jax.progress import say

    command_line.quiet_libraries()
    command_line.check_platform()
    metrics = [] if _FLAGS.metrics == ["all"] else _FLAGS.metrics
    html.compare(_FLAGS.compare, metrics, storage.reached(_FLAGS.out))
    say(Console(), f"the comparison is in {_FLAGS.out}/{html.FILE}")


def _options() -> Options:
    values: dict[str, Any] = {}
    for name, field in _OPTIONS.items():
        value: Any = _FLAGS[name].value
        if field.type is int and value < 0:
            raise UserError(f"--{name} is {value}: it must not be negative.")
        if field.type == Sequence[float]:
            value = command_line.positive_numbers(f"--{name}", value)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    if values["seed"] >= 2**32:
        raise UserError(f"--seed is {values['seed']}: expected 0 to 2**32 - 1.")
    return Options(**values)


def _parse(argv: list[str]) -> list[str]:
    if any(argument.startswith("--help") for argument in argv):
        print(__doc__, _FLAGS.get_help(), sep="\n")
        sys.exit(0)
    try:
        argv = command_line.checked_arguments(argv, needed=False)
        rest = _FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}: flags begin with --.")
        if _FLAGS.compare:
            if _FLAGS.workdir or _FLAGS.checkpoint or not _FLAGS.out:
                raise UserError(
                    "--compare reads finished evaluations: give --out, a folder, and "
                    "neither --workdir nor --checkpoint."
                )
            return rest
        if bool(_FLAGS.workdir) == bool(_FLAGS.checkpoint):
            raise UserError("give --workdir or --checkpoint, one of the two.")
        if (_FLAGS.norm is None) != (_FLAGS.epsilon is None):
            raise UserError("--norm and --epsilon go together: give both or none.")
        if _FLAGS.checkpoint and not _FLAGS.out:
            raise UserError("--checkpoint needs --out, a folder for the report.")
        return rest
    except (UserError, flags.Error) as error:
        command_line.fail(error)


def cli() -> None:
    """Entry point of the command line."""
    # Libraries ask absl's own flags, which have nothing to parse here.
    flags.FLAGS(sys.argv[:1])
    main(_parse(sys.argv))


if __name__ == "__main__":
    cli()
