"""A digits job of a few steps, for the tests of job, checkpoints and interface."""

import io
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from atebm_jax import job
from atebm_jax.command_line import load_config

DIGITS = Path(__file__).parents[1] / "configs" / "digits.py"

# Fine names of folders, which rich would take for styles, faults or a picture.
NAMES = ("[bold]a", "a [/x]", "[link=x]a[/link]", "a:smile:b", "[red]")


def config(**overrides: Any) -> ConfigDict:
    """The digits config with both stages cut to 6 steps; overrides by dotted name."""
    settings = {
        "log_every_steps": 2,
        "stage1.batch_size": 16,
        "stage1.num_steps": 6,
        "stage1.eval_every_steps": 3,
        "stage1.checkpoint_every_steps": 2,
        "stage2.batch_size": 16,
        "stage2.num_steps": 6,
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
    result = load_config(str(DIGITS))
    result.update_from_flattened_dict(settings | overrides)
    return result


def run(settings: ConfigDict, workdir: str | Path, **options: Any) -> tuple[dict, str]:
    """Runs a job; returns its report and what it printed."""
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    report = job.run(settings, workdir, console=console, **options)
    return report, printed.getvalue()
