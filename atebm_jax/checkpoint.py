"""Checkpoints with Orbax: save, restore, keep the best, load the weights alone.

A workdir holds `checkpoints/<stage>/<step>/`. Each step has the whole train state, a
small JSON that says what it is (`meta`: format, stage, step, T, config, names of the
classes, and what the watch over the stage's health remembers) and, where seeds are
drawn from Gaussians, these (`seeds`): samples need no data. Kept are the last two
steps, the best by robust accuracy and the best by sample distance.

A killed process leaves no broken step: one appears under its number only when it is
complete, with the checksums of its files, and is moved to `trash/` before it is
deleted. `intact` chooses the step to go on from.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from atebm_jax import checksums, release_format, sharding
from atebm_jax.errors import UserError, check_choice
from atebm_jax.local_path import absolute
from atebm_jax.model_names import located
from atebm_jax.names import check_utf8, of_class
from atebm_jax.seeds import Gaussian
from atebm_jax.stages import STAGES
from atebm_jax.storage import in_bucket
from atebm_jax.train_step import TrainState

_log = logging.getLogger(__name__)

FORMAT = 1

#: Metrics by which a best checkpoint is kept, and whether more is better.
BEST_BY: dict[str, bool] = {"robust_accuracy": True, "sample_distance": False}

# Where Orbax keeps the metrics of a step.
_METRICS = "metrics/metrics"

# What an earlier version called the stage's own state.
_EXTRA_BEFORE = "curriculum"

# The stage of weights that came from elsewhere.
IMPORTED = "imported"


def stage_folder(workdir: str | epath.Path, stage: str) -> epath.Path:
    """`workdir/checkpoints/<stage>`."""
    return absolute(workdir) / "checkpoints" / stage


class _Manager(ocp.CheckpointManager):
    """Orbax's, without its own watch for preemption.

    It asks JAX with the step's number. `StopSignal` asks with a count of its own. With
    both, JAX names a moment to stop at that is never reached.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


def manager(workdir: str | epath.Path, stage: str) -> ocp.CheckpointManager:
    """Opens (and creates) the checkpoints of one stage for writing.

    Saves are asynchronous; call `close` to wait for the last one.
    """
    folder = stage_folder(workdir, stage)
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        _remove_leftovers(folder)
    best_n = functools.partial(
        checkpoint_managers.BestN, n=1, keep_checkpoints_without_metrics=False
    )
    policies = [best_n(get_metric_fn=_rank_by(name)) for name in BEST_BY]
    policies = [checkpoint_managers.LatestN(2), *policies]
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        # Without a best_fn Orbax does not store the metrics that the policies read.
        best_fn=_rank_by("robust_accuracy"),
        todelete_subdir="trash",
        # Called by the first process between the last file and the commit.
        async_options=ocp.options.AsyncOptions(
            post_finalization_callback=lambda: _write_checksums(folder)
        ),
    )
    return _Manager(folder, options=options, item_names=("state", "meta", "seeds"))


def save(
    checkpoints: ocp.CheckpointManager,
    state: TrainState,
    *,
    stage: str,
    config: ml_collections.ConfigDict,
    metrics: Mapping[str, float] | None,
    contrastive_steps: int = 0,
    gaussian: Gaussian | None = None,
    watch: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Saves a state under its step; does nothing if it is there with its metrics.

    Args:
      checkpoints: as of `manager`.
      state, stage, config: what is saved; the config is the whole one.
      metrics: evaluation at this step, with the keys of `BEST_BY`, or None.
      contrastive_steps: T, which it has reached; 0 without any.
      gaussian: what seeds are drawn from; None where they are noise or a data set.
      watch: what a resumed job must know besides the state, as plain JSON values.
      class_names: what the network's outputs mean, by number; None if nobody knows.
    """
    step = int(state.step)
    if step in checkpoints.all_steps():
        if metrics is None or was_evaluated(checkpoints, step):
            return
        # Saved by a job that was stopped in its evaluation.
        delete(checkpoints, step)
    meta = {
        "format": FORMAT,
        "stage": stage,
        "step": step,
        "config": as_json(config),
        "T": contrastive_steps,
        "class_names": None if class_names is None else list(class_names),
    }
    if watch is not None:
        meta["watch"] = dict(watch)
    items: dict[str, ocp.args.CheckpointArgs] = {
        "state": ocp.args.StandardSave(state),
        "meta": ocp.args.JsonSave(meta),
    }
    if gaussian is not None:
        items["seeds"] = ocp.args.StandardSave(gaussian.arrays())
    checkpoints.save(
        step,
        args=ocp.args.Composite(**items),
        metrics=None if metrics is None else dict(metrics),
    )


def delete(checkpoints: ocp.CheckpointManager, step: int) -> None:
    """Deletes a saved step; every process of the job must call it."""
    checkpoints.delete(step)
    if jax.process_index() == 0:
        # If the step is saved and deleted again, it needs the same place in the trash.
        _remove_leftovers(epath.Path(checkpoints.directory))


def saved_watch(checkpoints: ocp.CheckpointManager, step: int) -> Any:
    """What `save` was given as `watch`; None where that, or the step, is not there."""
    if step not in checkpoints.all_steps():
        return None
    return _read_meta(epath.Path(checkpoints.directory) / str(step)).get("watch")


def was_evaluated(checkpoints: ocp.CheckpointManager, step: int) -> bool:
    """Whether a saved step has its metrics beside it."""
    return (epath.Path(checkpoints.directory) / str(step) / _METRICS).exists()


def restore(checkpoints: ocp.CheckpointManager, step: int, like: Any) -> TrainState:
    """Restores a state onto the devices and shardings of another.

    Args:
      checkpoints, step: as of `manager`, and one of its steps.
      like: a state of the same structure, of arrays or `jax.ShapeDtypeStruct`, with
        the shardings that the result shall have.

    Raises:
      UserError: the checkpoint cannot be read or holds another structure.
    """
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    folder = epath.Path(checkpoints.directory) / str(step)
    fields = {f.name: getattr(target, f.name) for f in dataclasses.fields(target)}
    # Skip what this stage does not have; an earlier version stored it in every stage.
    fields = {name: tree for name, tree in fields.items() if jax.tree.leaves(tree)}
    try:
        with _checkpointer() as checkpointer:
            stored = checkpointer.metadata(folder / "state").item_metadata.tree
            if "extra" in fields and "extra" not in stored:
                fields[_EXTRA_BEFORE] = fields.pop("extra")
            as_in_like = ocp.checkpoint_utils.construct_restore_args(fields)
            restored = _restored(checkpointer, folder / "state", fields, as_in_like)
    except Exception as error:
        raise UserError(
            f"checkpoint {folder} cannot be restored ({_first_line(error)}): it is "
            "damaged or of another network; delete that folder to go on from the step "
            "before."
        ) from error
    if _EXTRA_BEFORE in restored:
        restored["extra"] = restored.pop(_EXTRA_BEFORE)
    return dataclasses.replace(target, **restored)


def load_weights(
    path: str | epath.Path, *, best_by: str | None = None, together: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loads the averaged weights of a checkpoint as host arrays.

    Args:
      path: a workdir (its last stage's last step), a stage's folder (its last step),
        one step's folder, a release, or the name of one (`model_names`).
      best_by: instead of the last step the best one by this key of `BEST_BY`.
      together: every process of the job calls this, and checks a share of the files.

    Returns:
      ({"params": ..., "batch_stats": ...} of float32 numpy arrays, meta) with meta's
      "config" as plain dicts and, where seeds were drawn from Gaussians, "seeds": the
      arrays of `seeds.Gaussian`.

    Raises:
      UserError: nothing is there, or it cannot be read, or a file is not as it was
        saved. No other step than the one that is asked for is taken instead.
    """
    folder = find(path, best_by=best_by)
    if release_format.is_release(folder):
        return release_format.read(folder)
    fault = damage(folder) if together else checksums.damage(folder)
    if fault:
        others = [str(s) for s in steps_in(folder.parent) if str(s) != folder.name]
        remedy = f"load another step ({', '.join(others)})" if others else "replace it"
        raise UserError(
            f"checkpoint {folder} is damaged: {fault}; {remedy}, or bring the file "
            "back from a copy."
        )
    warn_if_unchecked(folder)
    try:
        meta = _read_meta(folder)
        weights = _read_arrays(folder / "state", _AVERAGES)
        if (folder / "seeds").exists():
            meta["seeds"] = _read_arrays(folder / "seeds")
    except Exception as error:
        raise UserError(
            f"checkpoint {folder} cannot be read ({_first_line(error)}): it is damaged "
            "or no checkpoint of this project; choose another step of it."
        ) from error
    if meta.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {folder} has format {meta.get('format')!r}: this version "
            f"reads format {FORMAT}."
        )
    return weights, meta


def class_names(meta: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names of a network's classes, by number; None where its `meta` has none."""
    names = meta.get("class_names")
    return tuple(of_class(str(name)) for name in names) if names else None


def newest_meta(folder: epath.Path) -> dict[str, Any] | None:
    """The `meta` of the last step of a stage that has a readable one, None if none."""
    metas = (meta_of(folder / str(step)) for step in reversed(steps_in(folder)))
    return next((meta for meta in metas if meta is not None), None)


def meta_of(folder: epath.Path) -> dict[str, Any] | None:
    """The `meta` of one step, or of a release; None if it is not readable."""
    try:
        meta = _read_meta(folder)
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) else None


def damage(folder: epath.Path) -> str | None:
    """What is wrong with a step's files, None if nothing is; the same in all processes.

    Every process must call it: each reads its share of the files.
    """
    found = checksums.damage(folder, jax.process_index(), jax.process_count())
    return sharding.first_said(found or "") or None


def warn_if_unchecked(folder: epath.Path) -> None:
    """Warns of a step of an earlier version: without checksums it cannot be checked."""
    if jax.process_index() == 0 and not checksums.exist(folder):
        _log.warning(
            "checkpoint %s has no checksums (%s): whether its files are as they were "
            "saved is not known",
            folder,
            checksums.FILE,
        )


def find(path: str | epath.Path, *, best_by: str | None = None) -> epath.Path:
    """The folder of the step or release that `path` means; see `load_weights`.

    Raises:
      UserError: there is none.
    """
    folder = located(path)
    check_utf8("the path", folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"there is no checkpoint at {path}: the path {what}.")
    if best_by is not None:
        check_choice("best_by", best_by, BEST_BY)
    released = release_format.is_release(folder)
    if released or ((folder / "state").exists() and (folder / "meta").exists()):
        if best_by is not None:
            what = "a release" if released else "one step"
            raise UserError(
                f"{path} is {what} and best_by is {best_by!r}: give the workdir or "
                "the stage's folder, where there are steps to choose from."
            )
        return folder
    order = (*reversed(STAGES), IMPORTED)
    for candidate in (*(folder / "checkpoints" / stage for stage in order), folder):
        if steps := steps_in(candidate):
            step = steps[-1] if best_by is None else _best(candidate, steps, best_by)
            return candidate / str(step)
    raise UserError(
        f"there is no checkpoint at {path}: expected a workdir with a checkpoints/ "
        "folder, a stage's folder in it, one step's folder, or a release."
    )


# Name of a step's folder. Users may put other folders beside them.
_NUMBER = re.compile("0|[1-9][0-9]*")


def steps_in(folder: epath.Path) -> list[int]:
    """Complete steps in a stage's folder, ascending; none if it does not exist.

    Raises:
      UserError: it cannot be read.
    """
    if not folder.is_dir():
        return []
    try:
        numbered = [p for p in folder.iterdir() if _NUMBER.fullmatch(p.name)]
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror or error}): make it readable, "
            "or give another path."
        ) from error
    return sorted(int(path.name) for path in numbered if not _is_partial(path))


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """A config as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def _remove_leftovers(folder: epath.Path) -> None:
    """Removes what a killed process was saving or deleting."""
    for path in folder.iterdir():
        if path.name == "trash" or _is_partial(path):
            path.rmtree()


def _is_partial(path: epath.Path) -> bool:
    """Whether a folder is a step that Orbax has not committed.

    Orbax commits a step by renaming it, in a bucket by a file that it writes last.
    """
    if in_bucket(path):
        return path.name.isdigit() and not (path / "commit_success.txt").exists()
    return "orbax-checkpoint-tmp" in path.name


def _write_checksums(folder: epath.Path) -> None:
    """Lists the files of the step that is being saved, just before it counts."""
    for path in folder.iterdir():
        if _is_partial(path):
            check_complete(path)
            checksums.write(path)


# Lists all arrays of an item. Without it none can be read, and Orbax does not notice
# that it has not written it.
_LIST_OF_ARRAYS = "manifest.ocdbt"


def check_complete(step_folder: epath.Path) -> None:
    """Refuses a step that was written in a way that nothing could read.

    Raises:
      UserError: the list of its arrays is missing.
    """
    if not (step_folder / "state" / _LIST_OF_ARRAYS).exists():
        raise UserError(
            f"the checkpoint in {step_folder} was written without the list of its "
            f"arrays (state/{_LIST_OF_ARRAYS}) and could not be read: it does not "
            "count. Give a --workdir on another disk, or with plainer names of folders."
        )


def _read_meta(step_folder: epath.Path) -> dict[str, Any]:
    if release_format.is_release(step_folder):
        return release_format.read_meta(step_folder)
    return json.loads((step_folder / "meta" / "metadata").read_text())


def _rank_by(name: str) -> Any:
    """Metrics -> a number that is greater for better ones."""
    sign = 1.0 if BEST_BY[name] else -1.0
    return lambda metrics: sign * metrics[name]


def _best(folder: epath.Path, steps: Sequence[int], best_by: str) -> int:
    rank, ranked = _rank_by(best_by), {}
    for step in steps:
        file = folder / str(step) / _METRICS
        if file.exists():
            ranked[step] = rank(json.loads(file.read_text()))
    if not ranked:
        raise UserError(f"no checkpoint in {folder} was evaluated: none is the best.")
    return max(ranked, key=lambda step: ranked[step])


@contextlib.contextmanager
def _checkpointer() -> Iterator[ocp.PyTreeCheckpointer]:
    """Orbax's reader, without its warnings about metadata that were never written."""
    log = logging.getLogger("absl")

    def unasked(record: logging.LogRecord) -> bool:
        return "Metadata file does not exist" not in record.getMessage()

    log.addFilter(unasked)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            yield checkpointer
    finally:
        log.removeFilter(unasked)


# The averaged weights in a train state, and what they are called alone.
_AVERAGES = {"average_params": "params", "average_batch_stats": "batch_stats"}


def _read_arrays(
    folder: epath.Path, names: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The arrays of an item, on the host: all, or some under other names."""
    with _checkpointer() as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata
        if metadata is None:
            raise ValueError("the list of its arrays is missing")
        item = {name: metadata.tree[name] for name in names or metadata.tree}
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        args = jax.tree.map(lambda _: as_numpy, item)
        restored = _restored(checkpointer, folder, item, args)
    return {(names or {}).get(name, name): tree for name, tree in restored.items()}


def _restored(
    checkpointer: ocp.PyTreeCheckpointer, folder: epath.Path, item: Any, args: Any
) -> dict[str, Any]:
    """The arrays of a folder that `item` names, restored by `args`."""
    wanted = ocp.args.PyTreeRestore(item, restore_args=args, partial_restore=True)
    return checkpointer.restore(folder, args=wanted)


def _first_line(error: Exception) -> str:
    lines = [line[:200] for line in str(error).strip().splitlines()]
    return ": ".join([type(error).__name__, *lines[:1]])
