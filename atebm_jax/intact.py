"""Restores the newest checkpoint whose files have not changed since it was saved."""

from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from atebm_jax import checkpoint
from atebm_jax.errors import UserError
from atebm_jax.train_step import TrainState


def newest(folder: epath.Path) -> tuple[int, dict[int, str]]:
    """The newest intact step of a stage, and what is wrong with later ones.

    Every process must call it: each reads its share of the files.

    Args:
      folder: of a stage, with at least one complete step.

    Returns:
      (step, {later step: what is wrong with it}).

    Raises:
      UserError: every step is damaged.
    """
    damaged: dict[int, str] = {}
    for step in reversed(checkpoint.steps_in(folder)):
        fault = checkpoint.damage(folder / str(step))
        if fault is None:
            return step, damaged
        damaged[step] = fault
    faults = "; ".join(f"{step}/{fault}" for step, fault in damaged.items())
    raise UserError(
        f"every checkpoint in {folder} is damaged: {faults}. Bring the files back from "
        "a copy, or delete that folder to begin the stage anew."
    )


def restore_newest(
    checkpoints: ocp.CheckpointManager, like: Any, note: Callable[[str], None]
) -> TrainState | None:
    """Restores the newest intact step; moves later, damaged ones out of the way.

    Args:
      checkpoints: as of `checkpoint.manager`.
      like: as for `checkpoint.restore`.
      note: shows a line to the user.

    Returns:
      The state; None if there is no step yet.

    Raises:
      UserError: every step is damaged, or the newest intact one does not fit.
    """
    if checkpoints.latest_step() is None:
        return None
    folder = epath.Path(checkpoints.directory)
    step, damaged = newest(folder)
    for later, fault in damaged.items():
        found, aside = folder / str(later), folder / f"{later}.damaged"
        if jax.process_index() == 0:
            _move(found, aside)
        note(
            f"checkpoint {found} is damaged: {fault}. It lies in {aside.name} now; "
            f"going on from step {step}."
        )
    if damaged:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints were moved")
        checkpoints.reload()
    checkpoint.warn_if_unchecked(folder / str(step))
    return checkpoint.restore(checkpoints, step, like)


def _move(source: epath.Path, target: epath.Path) -> None:
    if target.exists():
        target.rmtree()
    source.rename(target)
