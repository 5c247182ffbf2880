"""One job from config to report: its stages in turn, evaluation, sampling."""

import contextlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from atebm_jax import (
    archs,
    attacks,
    checkpoint,
    data,
    fitting,
    intact,
    models,
    reachability,
    recipes,
    release_format,
    seeds,
    sharding,
    storage,
    train,
)
from atebm_jax import config as configuration
from atebm_jax.errors import UserError
from atebm_jax.evaluate import pixel_scores
from atebm_jax.evaluate.evaluation import Evaluation
from atebm_jax.metric_writer import MetricWriter
from atebm_jax.names import check_utf8
from atebm_jax.preemption import StopSignal
from atebm_jax.progress import say
from atebm_jax.stages import STAGES
from atebm_jax.train import Job, Plan
from atebm_jax.workdir_lock import Lock


def run(
    config: ml_collections.ConfigDict,
    workdir: str | epath.Path,
    *,
    sources: Mapping[str, data.Source] | None = None,
    allow_config_change: bool = False,
    classes_by_place: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs a job to its end, or goes on with it from where it stopped.

    Args:
      config: a complete config (`config.default`).
      workdir: folder for everything the job writes; made if it is not there.
      sources: data sets to use instead of those that config.data names, by "train",
        "eval", "test" and "seeds" (`data.ArraySource` for images in memory).
      allow_config_change: go on with a workdir that was made by another config or
        from other images.
      classes_by_place: class k of the data is class k of the weights that are gone on
        from, and of the other data, whatever their names.
      console: where to show progress and table; default the terminal.

    Returns:
      The report, as in `report.json`.

    Raises:
      UserError: config, data, checkpoint or workdir cannot be used, or training
        keeps diverging.
      preemption.Interrupted: a signal asked to stop; it says what is saved.
    """
    configuration.check(config)
    workdir = storage.reached(workdir)
    check_utf8("workdir", workdir)
    console = console or Console()
    lock = Lock(workdir)
    with contextlib.ExitStack() as at_end:
        at_end.callback(lock.release)
        # Before anything is read: nobody may be writing it.
        lock.acquire()
        at_end.enter_context(storage.told_plainly(workdir))
        _check_start(config, workdir)
        mesh = sharding.make_mesh(config.mesh)
        model = models.build(config.model)
        sources = _open_sources(config, sources or {})
        note = partial(say, console)
        names = _follow_names(config, workdir, sources, classes_by_place, note)
        # Everything that can be refused is refused before anything is written.
        num_train = len(sources["train"])
        plans = _plan(config, mesh, model, num_train)
        _check_images(config, sources)
        shapes = models.variable_shapes(model, config.data.image_shape)
        origins = _origins(config, workdir, model, shapes, num_train)
        if not allow_config_change:
            _check_config(workdir, config)
        described = _describe(sources)
        if not allow_config_change:
            _check_data(workdir, sources, described, classes_by_place)
        keep_seeds = _fit_seeds(config, workdir, sources, note, allow_config_change)
        _claim(workdir, config, described, lock)
        stop = StopSignal()
        at_end.callback(stop.restore)
        writer = MetricWriter(workdir)
        at_end.callback(writer.close)
        gaussian = None if keep_seeds is None else keep_seeds()
        evaluation = Evaluation(config, workdir, mesh, model, sources, stop, gaussian)
        job = Job(
            config=config,
            workdir=workdir,
            mesh=mesh,
            model=model,
            shapes=shapes,
            sources=sources,
            gaussian=gaussian,
            evaluate=evaluation.periodic,
            writer=writer,
            console=console,
            stop=stop,
            lock=lock,
            class_names=names,
        )
        _greet(job)
        _tell_ahead(job, plans, evaluation)
        diverged = None
        for plan in plans:
            # A stage that starts from a diverged one would say nothing.
            diverged = diverged or train.train_stage(job, plan, origins[plan.name])
        return evaluation.final(console, diverged)


def _check_start(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Refuses a stage without its weights before a large data set is opened.

    And a release as workdir, whose config.json would be written over.
    """
    if release_format.is_release(workdir):
        raise UserError(
            f"workdir {workdir} is a release: give another --workdir, and "
            f"--config.init_from={workdir} to start from it."
        )
    begun = any(
        checkpoint.steps_in(checkpoint.stage_folder(workdir, stage)) for stage in STAGES
    )
    first = configuration.stages_to_run(config)[0]
    if STAGES[first].starts_from and not config.init_from and not begun:
        raise UserError(
            f"config.stages is {config.stages!r}: {first} alone needs weights to "
            "start from: give --config.init_from=CHECKPOINT, a workdir or what "
            "atebm_jax.convert made of a PyTorch file, or run "
            f"{STAGES[first].starts_from} in {workdir} first."
        )


def _open_sources(
    config: ml_collections.ConfigDict, given: Mapping[str, data.Source]
) -> dict[str, data.Source]:
    """The data sets of a job by role; equal specs are opened once."""
    opened: dict[str, data.Source] = {}
    sources = {}
    for role in ("train", "eval", "test", "seeds"):
        spec = config.data[role]
        if role in given:
            sources[role] = given[role]
        elif role == "seeds" and spec in seeds.DRAWN:
            continue
        else:
            if spec not in opened:
                opened[spec] = _open_source(config, role)
            sources[role] = opened[spec]
        classes = sources[role].num_classes
        if role != "seeds" and classes != config.model.num_classes:
            raise UserError(
                f"config.data.{role}={spec} has {classes or 'no'} classes and "
                f"config.model.num_classes is {config.model.num_classes}: they must "
                "be the same."
            )
    return sources


def _follow_names(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    sources: dict[str, data.Source],
    by_place: bool,
    note: Callable[[str], None],
) -> tuple[str, ...] | None:
    """Has all labels mean what those of the weights mean that are gone on from.

    Returns:
      The names of the classes, by number; None where neither weights nor data say.
    """
    meta = _known_meta(config, workdir)
    names = None if meta is None else checkpoint.class_names(meta)
    if meta is not None and names is None and sources["train"].class_names:
        note(
            "the weights to go on from do not name their classes: class k of the data "
            "is taken for their class k."
        )
    for role in ("train", "eval", "test"):
        what = f"config.data.{role}={sources[role].spec}"
        known = None if by_place else names
        sources[role] = data.relabel.follow(sources[role], known, what, note=note)
        if role == "train":
            names = sources[role].class_names or names
    return names


def _known_meta(
    config: ml_collections.ConfigDict, workdir: epath.Path
) -> dict[str, Any] | None:
    """The `meta` of the weights that the job goes on or starts from; None if none."""
    stages = configuration.stages_to_run(config)
    metas = {
        stage: checkpoint.newest_meta(checkpoint.stage_folder(workdir, stage))
        for stage in STAGES
    }
    if config.init_from == configuration.RANDOM:
        return metas[stages[0]]
    if config.init_from and metas[stages[0]] is None:
        try:
            folder = checkpoint.find(config.init_from)
        except UserError:
            return None  # told where the weights are read
        return checkpoint.meta_of(folder)
    before = STAGES[stages[0]].starts_from
    for name in reversed((*([before] if before else []), *stages)):
        if metas[name] is not None:
            return metas[name]
    return None


def _open_source(config: ml_collections.ConfigDict, role: str) -> data.Source:
    try:
        return data.open_source(config.data[role], config.data.data_dir)
    except UserError as error:
        drawn = f" Or {', '.join(seeds.DRAWN)}." if role == "seeds" else ""
        raise UserError(f"config.data.{role}: {error}{drawn}") from error


def _plan(
    config: ml_collections.ConfigDict, mesh: Mesh, model: nn.Module, num_train: int
) -> list[Plan]:
    """The stages to run; has every room check its part of the config."""
    plans = []
    sizes = {"evaluate.batch_size": (config.evaluate.batch_size, 1)}
    for name in configuration.stages_to_run(config):
        block = config[name]
        total = configuration.num_steps(block, num_train)
        plans.append(train.plan_stage(config, name, model, total, mesh))
        sizes[f"{name}.batch_size"] = (block.batch_size, block.num_micro_batches)
    for field, (size, parts) in sizes.items():
        sharding.check_batch_size(size, mesh.size, f"config.{field}", parts)
    attacks.adversary(**config.evaluate.attack)
    pixel_scores.check_judge(config.evaluate.samples.judge)
    recipes.check_sampler(config.evaluate.samples.sampler)
    return plans


# Which operations meet the images of which role.
_OPERATIONS = {
    "train": ("augment_cls", "augment_gen", "preprocess"),
    "eval": ("preprocess",),
    "test": ("preprocess",),
    "seeds": ("augment_seeds", "preprocess_seeds"),
}


def _check_images(
    config: ml_collections.ConfigDict, sources: dict[str, data.Source]
) -> None:
    """Sends one image through every chain of operations that the job will use."""
    for role, fields in _OPERATIONS.items():
        for field in fields:
            operations = config.data[field]
            try:
                data.parse(operations)
                if role not in sources:
                    continue
                data.materialise(
                    sources[role],
                    operations,
                    tuple(config.data.image_shape),
                    limit=1,
                    max_bad_images=1,
                )
            except UserError as error:
                raise UserError(
                    f"config.data.{field}={operations!r}: {error}"
                ) from error


# In the workdir: what tells the images of each role from others.
_DATA_FILE = "data.json"


def _describe(sources: Mapping[str, data.Source]) -> dict[str, Any]:
    """What tells the images of each role from others, in the first process alone."""
    if jax.process_index() != 0:
        return {}
    distinct = {id(source): source for source in sources.values()}
    found = {key: data.content.describe(source) for key, source in distinct.items()}
    return {role: found[id(source)] for role, source in sources.items()}


def _check_config(workdir: epath.Path, config: ml_collections.ConfigDict) -> None:
    """Refuses a workdir that another config has made."""
    path = workdir / "config.json"
    if not path.exists():
        return
    stored = configuration.complete(_read_stored(path))
    changed = configuration.differences(stored, checkpoint.as_json(config))
    if changed:
        raise UserError(
            f"workdir {workdir} was made by another config: "
            f"{'; '.join(changed)}. Give the same config, another --workdir, or "
            "--allow_config_change to go on with this one."
        )


def _check_data(
    workdir: epath.Path,
    sources: Mapping[str, data.Source],
    described: Mapping[str, Any],
    by_place: bool,
) -> None:
    """Refuses other images than those that a workdir was made from.

    An earlier version kept nothing of them; then there is nothing to compare.
    """
    path = workdir / _DATA_FILE
    with sharding.refused_by_all():
        # Of the first process alone.
        stored = _read_stored(path) if described and path.exists() else {}
        for role, now in described.items():
            data.content.check(
                f"config.data.{role}={sources[role].spec}",
                stored.get(role),
                now,
                since=f"workdir {workdir} was begun",
                remedy="give another --workdir, or --allow_config_change to go on "
                "with these",
                by_place=by_place,
            )


def _claim(
    workdir: epath.Path,
    config: ml_collections.ConfigDict,
    described: Mapping[str, Any],
    lock: Lock,
) -> None:
    """Makes the workdir, or refuses one that another job has."""
    files = {"config.json": checkpoint.as_json(config), _DATA_FILE: described}
    with storage.writing(f"workdir {workdir}"):
        for folder in ("checkpoints", "events", "samples"):
            (workdir / folder).mkdir(parents=True, exist_ok=True)
        lock.acquire()
        if jax.process_index() == 0:
            for name, content in files.items():
                storage.write_json(workdir / name, content)


def _read_stored(path: epath.Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. {_DAMAGED}") from error
    if not isinstance(stored, dict):
        raise UserError(f"{path} is not as it was written. {_DAMAGED}")
    return stored


_DAMAGED = "Give --allow_config_change to write it anew, or another --workdir."


def _fit_seeds(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    sources: Mapping[str, data.Source],
    note: Callable[[str], None],
    anew: bool,
) -> Callable[[], seeds.Gaussian] | None:
    """Fits Gaussian seeds and returns the function that keeps them; None for others."""
    if config.data.seeds not in seeds.FITTED or "seeds" in sources:
        return None
    return seeds.fit_if_absent(
        config.data.seeds,
        sources["train"],
        config.data,
        workdir / seeds.FILE,
        note,
        anew=anew,
    )


def _greet(job: Job) -> None:
    number = parameter_overview.count_parameters(job.shapes["params"])
    config = job.config.model
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    say(
        job.console,
        f"atebm_jax {importlib.metadata.version('atebm_jax')}: "
        f"{archs.describe(config)}, {number:,} parameters, {config.dtype}, "
        f"on {devices}; workdir {job.workdir}",
    )


def _tell_ahead(job: Job, plans: Sequence[Plan], evaluation: Evaluation) -> None:
    """Says before the first step what evaluations cost and how far seeds can go."""
    folders = {s: checkpoint.stage_folder(job.workdir, s) for s in STAGES}
    reached = {s: max(checkpoint.steps_in(f), default=0) for s, f in folders.items()}
    to_train = [plan for plan in plans if reached[plan.name] < plan.num_steps]
    if not to_train:
        return
    for plan in to_train:
        if sentence := evaluation.cost_of_periodic(plan.name, plan.num_steps):
            say(job.console, f"warning: {sentence}")
    to_run = {plan.name for plan in plans}
    evaluated = [s for s in reached if reached[s] or s in to_run]
    say(job.console, f"ahead: {evaluation.cost_of_final(evaluated)}")
    begins = any(p.method.curriculum and not reached[p.name] for p in to_train)
    if begins and evaluation.reachability is not None:
        for line in reachability.lines(evaluation.reachability):
            say(job.console, line)


def _random_variables(model: nn.Module, config: ml_collections.ConfigDict) -> Any:
    shape = (1, *config.data.image_shape)
    return model.init(jax.random.key(config.seed), jnp.zeros(shape))


def _origins(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    model: nn.Module,
    expected: Any,
    num_train: int,
) -> dict[str, Callable[[], Any]]:
    """For each stage what makes the variables that it starts from.

    The first stage to run starts from `init_from`, if that is given. Otherwise a stage
    starts from the averaged weights of the one before in the workdir, or at random.
    What is there already must fit the `expected` shapes.
    """

    def loaded(source: str | epath.Path, together: bool = False) -> Any:
        weights, meta = checkpoint.load_weights(source, together=together)
        weights = {k: v for k, v in weights.items() if v or k in expected}
        fitting.check_weights(expected, weights, str(source))
        stored = configuration.complete(meta["config"])["model"]
        fitting.check_function(config.model, stored, str(source))
        return weights

    def given() -> Any:
        try:
            return loaded(config.init_from)
        except UserError as error:
            raise UserError(f"config.init_from: {error}") from error

    folders = {s: checkpoint.stage_folder(workdir, s) for s in STAGES}
    # Damaged steps are stepped over here, and out of the way once the stage goes on.
    begun, damaged = {}, {}
    for stage, folder in folders.items():
        if checkpoint.steps_in(folder):
            begun[stage], damaged[stage] = intact.newest(folder)
            loaded(folder / str(begun[stage]), together=True)
    drawn = jax.jit(lambda: _random_variables(model, config))
    origins: dict[str, Callable[[], Any]] = {
        name: partial(loaded, folders[method.starts_from], together=True)
        if method.starts_from
        else drawn
        for name, method in STAGES.items()
    }
    first = configuration.stages_to_run(config)[0]
    before = STAGES[first].starts_from
    if config.init_from == configuration.RANDOM:
        origins[first] = drawn
    elif config.init_from:
        # Once the stage has begun, its source is needed no more.
        if first not in begun:
            given()
        origins[first] = given
    elif before and first not in begun:
        reached = begun.get(before, 0)
        wanted = configuration.num_steps(config[before], num_train)
        if reached < wanted:
            # Later steps that do not count, and why.
            skipped = "".join(
                f" (step {step} is damaged: {fault})"
                for step, fault in damaged.get(before, {}).items()
            )
            raise UserError(
                f"{first} starts from the weights of {before}, and that of "
                f"{workdir} is at step {reached} of {wanted}{skipped}: run {before} "
                "there to its end, or give --config.init_from=CHECKPOINT."
            )
    return origins
