"""A digits job of a few steps, for the tests of job, checkpoints and interface."""

import functools
import io
import os
import sys
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
import small
from absl.testing import flagsaver
from ml_collections import ConfigDict
from rich.console import Console

from atebm_jax import job, train, train_step
from atebm_jax.evaluate import __main__ as evaluate_command
from atebm_jax.evaluate import classification, evaluation
from atebm_jax.evaluate.context import Context

ROOT = Path(__file__).parents[1]
DIGITS = small.DIGITS

# Fine names of folders, which rich would take for styles, faults or a picture.
NAMES = ("[bold]a", "a [/x]", "[link=x]a[/link]", "a:smile:b", "[red]")

# A small network of each family: tracing a deep one takes long and says no more.
NETWORKS: tuple[dict[str, Any], ...] = (
    {"model.name": "wide_resnet", "model.depth": 10, "model.widen_factor": 1},
    {"model.name": "dm_wide_resnet", "model.depth": 10, "model.widen_factor": 1},
    {
        "model.name": "mean_sparse_wide_resnet",
        "model.depth": 10,
        "model.widen_factor": 1,
    },
    {
        "model.name": "mean_sparse_ra_wide_resnet",
        "model.blocks": "1-1-1",
        "model.widths": "4-4-8-8",
    },
    {"model.name": "jem_wide_resnet", "model.depth": 10, "model.widen_factor": 1},
    {"model.name": "cosine_wide_resnet", "model.depth": 10, "model.widen_factor": 1},
    {"model.name": "pssilu_wide_resnet", "model.depth": 10, "model.widen_factor": 1},
    *(
        {"model.name": name, "model.blocks": "1-1-1", "model.widths": "4-4-8-8"}
        for name in ("ra_wide_resnet", "robust_wide_resnet", "wrn_a")
    ),
    {
        "model.name": "ra_resnet",
        "model.blocks": "1-1-1-1",
        "model.widths": "4-8-8-16-16",
    },
    {"model.name": "preact_resnet", "model.depth": 18},
    {"model.name": "dm_preact_resnet", "model.depth": 18},
    {"model.name": "small_resnet", "model.depth": 18},
    {"model.name": "resnet", "model.depth": 18},
    {"model.name": "resnet", "model.depth": 50, "model.base_width": 4},
    {"model.name": "convnext", "model.size": "tiny"},
    {"model.name": "mean_sparse_convnext", "model.size": "tiny"},
    {"model.name": "vit", "model.size": "small", "model.position_grid": 2},
    {"model.name": "xcit", "model.size": "tiny", "model.depth": 1, "model.patch": 4},
    {"model.name": "swin", "model.size": "tiny", "model.position_grid": 8},
    {
        "model.name": "mean_sparse_swin",
        "model.size": "tiny",
        "model.position_grid": 8,
    },
)


def config(**overrides: Any) -> ConfigDict:
    """The digits config with both stages cut to 6 steps; overrides by dotted name.

    The network is the small one; "model.name" may be another's.
    """
    settings = {
        "log_every_steps": 2,
        "stage1.batch_size": 16,
        "stage1.num_steps": 6,
        "stage1.eval_every_steps": 3,
        "stage1.checkpoint_every_steps": 2,
        "stage2.batch_size": 16,
        "stage2.num_steps": 6,
        "stage2.warmup_steps": 0,
        "stage2.eval_every_steps": 3,
        "stage2.checkpoint_every_steps": 2,
        "stage2.auc_window_images": 32,
        "stage2.auc_threshold": 0.4,
        "evaluate.batch_size": 40,
        "evaluate.num_examples": 40,
        "evaluate.num_test_examples": 60,
        "evaluate.attack.num_steps": 2,
        "evaluate.samples.num": 20,
        "evaluate.samples.num_test": 50,
        "evaluate.samples.num_steps": 3,
        "evaluate.samples.grid_rows": 2,
        "evaluate.samples.num_reference": 300,
    }
    result = small.get_config()
    result.update_from_flattened_dict(settings | overrides)
    return result


def _once(make: Callable, key_of: Callable[..., Hashable]) -> Callable:
    """`make`, called once for all arguments of one key; the latest results are kept."""
    made: dict[Hashable, Any] = {}

    @functools.wraps(make)
    def get(*arguments: Any) -> Any:
        key = key_of(*arguments)
        made[key] = made.pop(key) if key in made else make(*arguments)
        if len(made) > 16:
            del made[next(iter(made))]
        return made[key]

    return get


def _key_of_step(config: ConfigDict, name: str, *rest: Any) -> Hashable:
    """What an update depends on; `train_step.make` too, as tests replace it."""
    factor, shape = config.rollback_learning_rate_factor, config.data.image_shape
    block = config[name].to_json()
    return block, config.seed, factor, shape, name, *rest, train_step.make


def _meaning(function: Callable) -> Hashable:
    """The same for two functions of one text and equal values around it."""
    if hasattr(function, "__self__"):
        # The text of a method says nothing of its object.
        return function
    around = getattr(function, "__closure__", None) or ()
    try:
        meaning = function.__code__, tuple(cell.cell_contents for cell in around)
        hash(meaning)
    except (AttributeError, TypeError, ValueError):
        return function
    return meaning


# Every job traces and compiles its programs anew; here jobs of one config share them.
train.plan_stage = _once(train.plan_stage, _key_of_step)
train.jit_step = _once(train.jit_step, lambda step, placement, mesh: (step, mesh))
classification.under_attack = _once(
    classification.under_attack, lambda attack: ConfigDict(attack).to_json()
)
Context.compiled = _once(
    Context.compiled,
    lambda self, function: (self.model, self.mesh, _meaning(function)),
)


def only_the_loop(patch: pytest.MonkeyPatch) -> None:
    """Leaves evaluation and report out of jobs."""
    patch.setattr(train, "_evaluate", lambda *_: None)
    patch.setattr(evaluation.Evaluation, "final", lambda *_: {})


def run(settings: ConfigDict, workdir: str | Path, **options: Any) -> tuple[dict, str]:
    """Runs a job; returns its report and what it printed."""
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    report = job.run(settings, workdir, console=console, **options)
    return report, printed.getvalue()


def evaluate(*arguments: str) -> None:
    """The evaluation command in this process; its flags are then as they were."""
    flags = evaluate_command._FLAGS
    before = flagsaver.save_flag_values(flags)
    try:
        evaluate_command.main(evaluate_command._parse(["evaluate", *arguments]))
    finally:
        flagsaver.restore_flag_values(before, flags)


def command(module: str, *arguments: str) -> list[str]:
    """A command of the package, in a process that knows the small network."""
    code = f"import small, runpy; runpy.run_module({module!r}, run_name='__main__')"
    return [sys.executable, "-c", code, *arguments]


def environment(devices: int = 1) -> dict[str, str]:
    """For a process of its own, with so many devices."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return os.environ | settings | {"PYTHONPATH": paths}


def wait_until(is_so: Callable[[], object], seconds: float = 60) -> None:
    """Returns as soon as a function's result is true; fails if it is not in time."""
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, f"not so after {seconds} s"
        time.sleep(0.2)
