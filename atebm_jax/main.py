"""The entry point: `python -m atebm_jax.main --config=configs/digits.py --workdir=DIR`.

Exit codes: 0 finished; 2 a mistake in flags, config, data or checkpoint, said in one
sentence; 128 + N stopped by signal N, saved, and continued by the same command.
"""

import inspect
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import util
from typing import NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from atebm_jax.config import check_override
from atebm_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with the row of its table: configs/cifar10.py:small."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, metrics, samples and report."
)
_ALLOW_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Go on with a workdir made by another config."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, for several processes outside TPU pods and Slurm.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator.")


def main(argv: Sequence[str]) -> None:
    """Runs the job that the flags describe."""
    del argv
    # Imported late, so that --help and a misspelt flag answer at once.
    from atebm_jax import job, preemption
    from atebm_jax.sharding import initialize_processes

    _quiet_libraries()
    try:
        initialize_processes(
            _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
        )
        job.run(_CONFIG.value, _WORKDIR.value, allow_config_change=_ALLOW_CHANGE.value)
    except UserError as error:
        _fail(error)
    except preemption.Interrupted as error:
        print(
            f"stopped by {error}: everything is saved in {_WORKDIR.value}; the same "
            "command goes on from there.",
            file=sys.stderr,
        )
        sys.exit(128 + error.signal_number)


def cli() -> None:
    """Entry point of the command line."""
    app.run(main, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    if any(argument.startswith("--help") for argument in argv):
        return flags.FLAGS(argv)
    try:
        _check_overrides(argv[1:])
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}: flags begin with --.")
        if not _WORKDIR.value:
            raise UserError("--workdir is missing: give a folder for the results.")
        return rest
    except (UserError, flags.Error) as error:
        _fail(error)


def _check_overrides(arguments: Sequence[str]) -> None:
    """Refuses a config that is not there and overrides that do not fit it."""
    values = dict(_flag_values(arguments))
    if "config" not in values:
        raise UserError(
            "--config is missing: give a config file, --config=configs/digits.py."
        )
    config = load_config(values.pop("config"))
    for name, value in values.items():
        if name.startswith("config."):
            check_override(config, name.removeprefix("config."), value)
        elif name.startswith("noconfig."):
            check_override(config, name.removeprefix("noconfig."), "false")


def _flag_values(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of each flag, written --name=value or --name value."""
    for position, argument in enumerate(arguments):
        if not argument.startswith("-"):
            continue
        name, equals, value = argument.lstrip("-").partition("=")
        following = arguments[position + 1 : position + 2]
        if not equals and following and not following[0].startswith("--"):
            value = following[0]
        elif not equals:
            value = "true"
        yield name, value


def load_config(path_and_row: str) -> ConfigDict:
    """Loads a config file, `configs/cifar10.py:small` with its row.

    Raises:
      UserError: no such file or row, or a file without `get_config`.
    """
    path, _, row = path_and_row.partition(":")
    if not os.path.isfile(path):
        raise UserError(f"there is no config file {path!r}: expected a .py file.")
    spec = util.spec_from_file_location("atebm_jax_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path!r} is no Python file (.py).")
    module = util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"config file {path!r} cannot be run: {type(error).__name__}: {error}."
        ) from error
    if not hasattr(module, "get_config"):
        raise UserError(f"config file {path!r} has no function get_config.")
    takes_row = bool(inspect.signature(module.get_config).parameters)
    if row and not takes_row:
        raise UserError(f"config file {path!r} has no rows: leave out {':' + row!r}.")
    return module.get_config(row) if row else module.get_config()


def _quiet_libraries() -> None:
    """Leaves only errors of the libraries, but warnings of this package, on screen."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Batches that workers made ahead of a stop lie in shared memory, which Python
    # frees at exit, with a warning.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")


def _fail(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    cli()
