"""The command: `python -m atebm_jax.evaluate --workdir=runs/digits --metrics=all`.

Exit codes: 0 finished; 2 a mistake in flags, config, data or checkpoint, said in one
sentence; 130 or 143 stopped by a signal. The same command then goes on.
"""

import math
import signal
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags
from rich.console import Console

from atebm_jax.command_line import (
    check_platform,
    checked_arguments,
    fail,
    quiet_libraries,
)
from atebm_jax.errors import UserError
from atebm_jax.evaluate.options import Options

# Of this command alone: several may be imported side by side.
_FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Workdir whose model is evaluated.", flag_values=_FLAGS
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Instead of --workdir: a stage's or a step's folder.",
    flag_values=_FLAGS,
)
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Data and evaluation settings other than the checkpoint's own.",
    flag_values=_FLAGS,
)
_METRICS = flags.DEFINE_list(
    "metrics", ["all"], "all, or some of the metrics' names.", flag_values=_FLAGS
)
_OUT = flags.DEFINE_string(
    "out", None, "Default: WORKDIR/evaluation.", flag_values=_FLAGS
)
_BEST_BY = flags.DEFINE_string(
    "best_by",
    None,
    "robust_accuracy or sample_distance: that checkpoint.",
    flag_values=_FLAGS,
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where TFDS data sets lie.", flag_values=_FLAGS
)
_BY_PLACE = flags.DEFINE_bool(
    "classes_by_place",
    False,
    "Class k of the data is class k of the network, whatever their names.",
    flag_values=_FLAGS,
)
_NUM_EXAMPLES = flags.DEFINE_integer(
    "num_examples", 1000, "Of each set; 0 for all.", flag_values=_FLAGS
)
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", 1000, "Generated images.", flag_values=_FLAGS
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of noise, attacks and resampling.", flag_values=_FLAGS
)
_EPSILONS = flags.DEFINE_list(
    "epsilons", [], "Radii of the curve under PGD.", flag_values=_FLAGS
)
_OOD = flags.DEFINE_list(
    "ood", ["noise"], "Out-of-distribution sets: noise, sources.", flag_values=_FLAGS
)
_RADII = flags.DEFINE_list(
    "radii", ["1", "2", "4", "8"], "Of counterfactuals, L2.", flag_values=_FLAGS
)
_TARGET = flags.DEFINE_string(
    "target",
    "next",
    "Of counterfactuals: next, runner_up or a class by number or name.",
    flag_values=_FLAGS,
)
_NORM = flags.DEFINE_string(
    "norm",
    None,
    "AutoAttack's: l2, linf or l1; default the config's.",
    flag_values=_FLAGS,
)
_EPSILON = flags.DEFINE_float(
    "epsilon", None, "AutoAttack's radius, with --norm.", flag_values=_FLAGS
)
_VERSION = flags.DEFINE_string(
    "autoattack_version",
    "standard",
    "standard, plus, rand or custom.",
    flag_values=_FLAGS,
)
_ATTACKS = flags.DEFINE_list(
    "attacks", [], "Of --autoattack_version=custom, in order.", flag_values=_FLAGS
)
_SAVE = flags.DEFINE_bool(
    "save_adversarial", False, "Keep AutoAttack's images.", flag_values=_FLAGS
)
_JUDGE = flags.DEFINE_string(
    "judge", None, "Checkpoint of an independent classifier.", flag_values=_FLAGS
)
_TEXTS: dict[str, Any] = {
    name: flags.DEFINE_string(name, default, text, flag_values=_FLAGS)
    for name, default, text in (
        ("feature_extractor", "", "inception, model, or a checkpoint."),
        ("inception_weights", None, "Path of Inception-v3's weights, for FID."),
        ("reference_statistics", None, "An .npz with mu and sigma of real images."),
        (
            "quantise",
            Options.quantise,
            "Samples to bytes: reference (down) or nearest.",
        ),
        ("score_protocol", "reference", "Of the Inception Score; or torch_fidelity."),
        ("cache_dir", None, "Of statistics of data sets."),
    )
}
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, for several processes outside TPU pods and Slurm.",
    flag_values=_FLAGS,
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "With --coordinator.", flag_values=_FLAGS
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "With --coordinator.", flag_values=_FLAGS
)
_COUNTS: dict[str, Any] = {
    name: flags.DEFINE_integer(name, default, text, flag_values=_FLAGS)
    for name, default, text in (
        ("num_reference", 0, "Real images for FID's statistics; 0 for all."),
        ("num_pairs", 5000, "Images of each side for precision and recall."),
        ("sweep", 3, "Numbers of steps to try below and above; 0 for none."),
        ("sweep_samples", 2560, "Samples for each of them."),
    )
}


def main(argv: Sequence[str]) -> None:
    """Runs the evaluation that the flags describe."""
    del argv
    # Imported late, so that --help and a misspelt flag answer at once.
    import jax

    from atebm_jax.evaluate import report, suite
    from atebm_jax.progress import parts, say
    from atebm_jax.sharding import initialize_processes

    quiet_libraries()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    path = _CHECKPOINT.value or _WORKDIR.value
    out = _OUT.value or f"{_WORKDIR.value}/evaluation"
    try:
        options = _options()
        initialize_processes(
            _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
        )
        check_platform()
        # One report from all processes.
        console = Console(quiet=jax.process_index() != 0)
        with parts(console) as show:
            result = suite.evaluate(
                path,
                out,
                metrics=_metric_names(suite.METRICS),
                config=_CONFIG.value,
                best_by=_BEST_BY.value,
                data_dir=_DATA_DIR.value,
                judge=_JUDGE.value,
                classes_by_place=_BY_PLACE.value,
                options=options,
                show=show,
            )
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        print(
            f"stopped: what is finished is kept in {out}; the same command goes on.",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGINT)
    report.show_figures(console, result)
    say(console, f"report and plots are in {out}")


def _metric_names(known: dict) -> tuple[str, ...]:
    return tuple(known) if _METRICS.value == ["all"] else tuple(_METRICS.value)


def _options() -> Options:
    for name, flag in {
        "num_examples": _NUM_EXAMPLES,
        "num_samples": _NUM_SAMPLES,
        "seed": _SEED,
        **_COUNTS,
    }.items():
        if flag.value < 0:
            raise UserError(f"--{name} is {flag.value}: it must not be negative.")
    if _SEED.value >= 2**32:
        raise UserError(f"--seed is {_SEED.value}: expected 0 to 2**32 - 1.")
    return Options(
        num_examples=_NUM_EXAMPLES.value,
        num_samples=_NUM_SAMPLES.value,
        seed=_SEED.value,
        epsilons=_numbers("epsilons", _EPSILONS.value),
        ood=tuple(_OOD.value),
        radii=_numbers("radii", _RADII.value),
        target=_TARGET.value,
        norm=_NORM.value,
        epsilon=_EPSILON.value,
        version=_VERSION.value,
        attacks=tuple(_ATTACKS.value),
        save_adversarial=_SAVE.value,
        **{name: flag.value for name, flag in (_TEXTS | _COUNTS).items()},
    )


def _numbers(name: str, texts: Sequence[str]) -> tuple[float, ...]:
    try:
        numbers = tuple(float(text) for text in texts)
    except ValueError:
        numbers = (math.nan,)
    if not all(0 < number < math.inf for number in numbers):
        raise UserError(
            f"--{name}={','.join(texts)}: expected positive numbers, with commas."
        )
    return numbers


def _parse(argv: list[str]) -> list[str]:
    if any(argument.startswith("--help") for argument in argv):
        print(__doc__, _FLAGS.get_help(), sep="\n")
        sys.exit(0)
    try:
        argv = checked_arguments(argv, needed=False)
        rest = _FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}: flags begin with --.")
        if bool(_WORKDIR.value) == bool(_CHECKPOINT.value):
            raise UserError("give --workdir or --checkpoint, one of the two.")
        if (_NORM.value is None) != (_EPSILON.value is None):
            raise UserError("--norm and --epsilon go together: give both or none.")
        if _CHECKPOINT.value and not _OUT.value:
            raise UserError("--checkpoint needs --out, a folder for the report.")
        return rest
    except (UserError, flags.Error) as error:
        fail(error)


def cli() -> None:
    """Entry point of the command line."""
    # Libraries ask absl's own flags, which have nothing to parse here.
    flags.FLAGS(sys.argv[:1])
    main(_parse(sys.argv))


if __name__ == "__main__":
    cli()
