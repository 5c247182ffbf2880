"""The entry point: `python -m atebm_jax.main --config=configs/digits.py --workdir=DIR`.

Exit codes: 0 finished; 2 a mistake in flags, config, data or checkpoint, said in one
sentence; 128 + N stopped by signal N, saved, and continued by the same command.
"""

import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from atebm_jax.command_line import (
    check_platform,
    checked_arguments,
    fail,
    quiet_libraries,
)
from atebm_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, or the name of one that comes with the package, with the row of its "
    "table: configs/cifar10.py:small, cifar10:small.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, metrics, samples and report."
)
_ALLOW_CHANGE = flags.DEFINE_bool(
    "allow_config_change",
    False,
    "Go on with a workdir made by another config or from other images.",
)
_BY_PLACE = flags.DEFINE_bool(
    "classes_by_place",
    False,
    "Class k of the data is class k of the weights, whatever their names.",
)
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    "workdir",
    "Folder of compiled programs, which a restart loads: 'workdir' for one in the "
    "workdir, 'off', or a path that all hosts see. $JAX_COMPILATION_CACHE_DIR goes "
    "before 'workdir'.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, for several processes outside TPU pods and Slurm.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Only say what memory and time a step would take."
)
_DEVICES = flags.DEFINE_integer("devices", 1, "With --dry_run: how many.")
_MEMORY = flags.DEFINE_float("device_memory_gib", 80.0, "With --dry_run: of each.")
_PEAK = flags.DEFINE_float(
    "peak_tflops", 989.0, "With --dry_run: of each; the default is an H100's bfloat16."
)
_UTILISATION = flags.DEFINE_float(
    "utilisation", 0.4, "With --dry_run: share of the peak to expect, an assumption."
)
_TARGET = flags.DEFINE_string(
    "target",
    None,
    "With --dry_run: compile for this machine, as v5e:2x4 (a TPU and its topology) or "
    "h100:8, which need not be here.",
)
_PROGRAM = flags.DEFINE_string(
    "program",
    "train",
    "With --target: what to compile, train, sample or autoattack.",
)
_DRY_RUN_JSON = flags.DEFINE_string(
    "dry_run_json", None, "With --dry_run: also write the figures to this file."
)


def main(argv: Sequence[str]) -> None:
    """Runs the job that the flags describe."""
    del argv
    # Imported late, so that --help and a misspelt flag answer at once.
    from atebm_jax import job, preemption
    from atebm_jax.compilation import use_cache
    from atebm_jax.sharding import initialize_processes

    quiet_libraries()
    try:
        if _DRY_RUN.value:
            _dry_run()
            return
        initialize_processes(
            _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
        )
        check_platform()
        use_cache(_CACHE.value or "off", str(_WORKDIR.value))
        job.run(
            _CONFIG.value,
            _WORKDIR.value,
            allow_config_change=_ALLOW_CHANGE.value,
            classes_by_place=_BY_PLACE.value,
        )
    except UserError as error:
        fail(error)
    except preemption.Interrupted as error:
        print(
            f"stopped by {error}: {error.kept} in {_WORKDIR.value}; the same command "
            "goes on from there.",
            file=sys.stderr,
        )
        sys.exit(128 + error.signal_number)


def _dry_run() -> None:
    from atebm_jax import dry_run, target_run, targets

    if _TARGET.value is not None:
        targets.only_compile()
        target_run.run(
            _CONFIG.value,
            _TARGET.value,
            program=_PROGRAM.value,
            json_file=_DRY_RUN_JSON.value,
        )
        return
    check_platform()
    machine = dry_run.Machine(
        _DEVICES.value, _MEMORY.value, _PEAK.value, _UTILISATION.value
    )
    dry_run.run(_CONFIG.value, machine, json_file=_DRY_RUN_JSON.value)


def cli() -> None:
    """Entry point of the command line."""
    app.run(main, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    if any(argument.startswith("--help") for argument in argv):
        return flags.FLAGS(argv)
    try:
        argv = checked_arguments(argv)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}: flags begin with --.")
        if not _WORKDIR.value and not _DRY_RUN.value:
            raise UserError("--workdir is missing: give a folder for the results.")
        _check_target()
        return rest
    except (UserError, flags.Error) as error:
        fail(error)


def _check_target() -> None:
    """Refuses flags that a target answers itself, and one that nothing would read."""
    if _TARGET.value is None:
        if _PROGRAM.present:
            raise UserError("--program is for --dry_run --target, which compiles it.")
        return
    if not _DRY_RUN.value:
        raise UserError("--target is for --dry_run, which compiles and runs nothing.")
    for flag in (_DEVICES, _MEMORY, _PEAK, _UTILISATION):
        if flag.present:
            raise UserError(
                f"--{flag.name} and --target={_TARGET.value} exclude each other: the "
                "target says what it has."
            )


if __name__ == "__main__":
    cli()
