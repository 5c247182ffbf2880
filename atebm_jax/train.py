"""The training loop: one stage from its first or its last saved step to its end."""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from atebm_jax import (
    checkpoint,
    data,
    health,
    intact,
    models,
    optim,
    sharding,
    train_step,
)
from atebm_jax.config import RANDOM
from atebm_jax.errors import UserError
from atebm_jax.metric_writer import MetricWriter
from atebm_jax.preemption import Interrupted, StopSignal
from atebm_jax.progress import ProgressLine, say
from atebm_jax.seeds import Gaussian
from atebm_jax.stages import STAGES, Method, Stage
from atebm_jax.train_step import TrainState
from atebm_jax.workdir_lock import Lock

# (stage, step, averaged variables) -> held-out metrics, the keys of checkpoint.BEST_BY
# among them.
EvaluateFn = Callable[[str, int, Any], dict[str, float]]


class Job(NamedTuple):
    """What every stage of one job shares."""

    config: ml_collections.ConfigDict
    workdir: epath.Path
    mesh: Mesh
    model: nn.Module
    shapes: Any  # of the network's variables
    sources: Mapping[str, data.Source]  # by role; "seeds" unless they are drawn
    gaussian: Gaussian | None  # what seeds are drawn from, unless read or noise
    evaluate: EvaluateFn
    writer: MetricWriter
    console: Console
    stop: StopSignal
    lock: Lock
    class_names: tuple[str, ...] | None = None  # what the network's outputs mean


class Plan(NamedTuple):
    """One stage of a job, resolved from its config once."""

    name: str  # a key of `STAGES`
    block: ml_collections.ConfigDict  # its block of the config
    method: Method
    stage: Stage  # the method for the job's network
    num_steps: int
    step: train_step.StepFn  # the update, not yet compiled
    new_state: Callable[[Any], TrainState]  # variables -> fresh state
    setting: health.Setting


# Keeps the seeds of training apart from those of samples, whose numbers are below.
_TRAINING_SEEDS = 2**32


class Diverged(Exception):
    """Steps up to `step` were not finite, or the network is dying.

    Attributes:
      step: the last one looked at.
      watch: what is remembered of the stage until then.
      signs: of dying; none where too many steps in a row were not finite.
    """

    def __init__(
        self, step: int, watch: health.Watch, signs: Sequence[health.Sign] = ()
    ):
        super().__init__(step)
        self.step, self.watch, self.signs = step, watch, signs

    def marks(self) -> dict[str, int]:
        """For the metrics: at which step which sign was seen."""
        names = [sign.name for sign in self.signs] or ["not_finite"]
        return {f"sign_{name}": self.step for name in names}


class _Run(NamedTuple):
    """A stage that is being trained."""

    job: Job
    plan: Plan
    checkpoints: ocp.CheckpointManager


def train_stage(
    job: Job, plan: Plan, initial: Callable[[], Any]
) -> dict[str, Any] | None:
    """Trains one stage to its end; goes on from its last checkpoint if there is one.

    Killing the process at any moment and calling this again ends with the same
    parameters, bit by bit, on the same number of devices.

    Args:
      job: config, data, network and where to write.
      plan: the stage, as of `plan_stage`.
      initial: makes the variables to start from; called only for a fresh start and
        after a rollback to the beginning.

    Returns:
      Where the config has divergence reported and it was seen: "stage", "step" and what
      was "seen". The last checkpoint is then the last good one, if there is any.

    Raises:
      UserError: training keeps diverging.
      Interrupted: asked to stop; it says what is saved.
    """
    name = plan.name
    like = placed_state(plan, job.shapes, job.mesh)
    placement = jax.tree.map(lambda x: x.sharding, like)
    step_fn = jit_step(plan.step, placement, job.mesh)
    checkpoints = checkpoint.manager(job.workdir, name)
    run = _Run(job, plan, checkpoints)

    def latest() -> TrainState:
        """The newest intact state; a fresh one where there is none yet."""
        restored = intact.restore_newest(checkpoints, like, partial(say, job.console))
        if restored is not None:
            return restored
        # Split from the start: only the variables themselves are ever whole.
        variables = sharding.put_state(jax.device_get(initial()), job.mesh)
        return jax.jit(plan.new_state, out_shardings=placement)(variables)

    try:
        state = latest()
        watch = _watch(run, state)
        _finish_evaluation(run, state, watch)
        marks: dict[str, int] = {}
        while int(state.step) < plan.num_steps:
            # Read now: the step takes the state's buffers for its own.
            first, rollbacks = int(state.step), int(state.rollbacks)
            offset = int(state.data_offset)
            job.writer.rewind(name, first, rollbacks)
            if marks:
                job.writer.write(name, first, {**marks, "rollbacks": rollbacks})
            try:
                state = _advance(run, state, watch, step_fn)
            except Diverged as error:
                _delete_dying(run, error)
                if job.config.on_dying == "report":
                    return _reported(run, error)
                _check_rollbacks(job.config, name, error, rollbacks + 1)
                state = _rolled_back(
                    run, latest(), error.step + offset, rollbacks=rollbacks + 1
                )
                watch = replace(_watch(run, state), count=error.watch.count)
                marks = error.marks()
    finally:
        # Waits for a save that is under way, also when interrupted.
        checkpoints.close()
    return None


def placed_state(plan: Plan, shapes: Any, mesh: Mesh) -> TrainState:
    """Shapes of a fresh state, each with where it lives between two steps.

    `shapes` are those of the network's variables, as of `models.variable_shapes`.
    """
    placed = sharding.placed_shapes(jax.eval_shape(plan.new_state, shapes), mesh)
    if not plan.stage.split_extra:
        return placed
    rows = sharding.batched(mesh)
    extra = jax.tree.map(lambda x: x.update(sharding=rows), placed.extra)
    return replace(placed, extra=extra)


def jit_step(step: train_step.StepFn, placement: Any, mesh: Mesh) -> train_step.StepFn:
    """Compiles an update that takes the state's buffers for its own.

    They lie, and the new ones will, where `placement` says: shardings of the state.
    """
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(placement, sharding.batched(mesh)),
        out_shardings=(placement, sharding.replicated(mesh)),
    )


def plan_stage(
    config: ml_collections.ConfigDict,
    name: str,
    model: nn.Module,
    num_steps: int,
    mesh: Mesh | None = None,
) -> Plan:
    """A stage as its config describes it: its method, length and update.

    Args:
      config, model: of the whole job.
      name, num_steps: of the stage, a key of `STAGES`, and its length.
      mesh: where state and batch live; None for a step that is only traced.

    Raises:
      UserError: a value of the stage's config is refused.
    """
    block, method = config[name], STAGES[name]
    _check_micro_batches(config, name, model)
    optimizer = optim.optimizer(block.optimizer, weight_decay=block.weight_decay)
    learning_rate = optim.schedule(
        block.schedule,
        peak=block.learning_rate,
        num_steps=num_steps,
        warmup_steps=block.warmup_steps,
        decay_at=tuple(block.decay_at),
        decay_factor=block.decay_factor,
    )
    stage = method.build(model, block)
    options: dict[str, Any] = {}
    if mesh is not None:
        options["gather"] = partial(sharding.gather, mesh=mesh)
        options["scatter"] = partial(sharding.scatter, mesh=mesh)

    def new_state(variables: Any) -> TrainState:
        key, shape = jax.random.key(config.seed), tuple(config.data.image_shape)
        extra = stage.init(key, shape)
        return train_step.create_state(variables, optimizer, extra=extra)

    step = train_step.make(
        stage,
        optimizer,
        learning_rate,
        seed=config.seed,
        max_decay=block.average_decay,
        num_micro_batches=block.num_micro_batches,
        rollback_factor=config.rollback_learning_rate_factor,
        **options,
    )
    return Plan(
        name,
        block,
        method,
        stage,
        num_steps,
        step,
        new_state,
        health.Setting(
            stage=name,
            num_classes=config.model.num_classes,
            batch_size=block.batch_size,
            classifies=method.classifies(block),
            t_max=method.t_max(block),
            auc_window=method.window(block),
            trained=bool(method.starts_from) and config.init_from != RANDOM,
        ),
    )


def _check_micro_batches(
    config: ml_collections.ConfigDict, name: str, model: nn.Module
) -> None:
    """Refuses parts of a batch where each would be normalised by itself."""
    parts = config[name].num_micro_batches
    if not STAGES[name].whole_batch(config[name]) or parts == 1:
        return
    if "batch_stats" in models.variable_shapes(model, config.data.image_shape):
        raise UserError(
            f"config.{name}.num_micro_batches is {parts}, and {name} normalises "
            f"{config.model.name} over the whole batch (BatchNorm): parts would have "
            "statistics of their own, so set it to 1, or choose a network without."
        )


def _watch(run: _Run, state: TrainState) -> health.Watch:
    """What was remembered of the stage's health at the step of a state."""
    stored = checkpoint.saved_watch(run.checkpoints, int(state.step))
    return health.restore(stored, run.plan.setting)


def _finish_evaluation(run: _Run, state: TrainState, watch: health.Watch) -> None:
    """Evaluates the step at which a job was stopped in the middle of that."""
    step = int(state.step)
    if step == 0 or not _due(step, run.plan.block.eval_every_steps, run.plan):
        return
    if checkpoint.was_evaluated(run.checkpoints, step):
        return
    run.job.writer.rewind(run.plan.name, step, int(state.rollbacks))
    log = _Log(run.job, run.plan, watch, step)
    held_out = _evaluate(run.job, run.plan.name, state)
    log.evaluated(step, held_out)
    log.close()
    _save(run, log, state, held_out)


def _advance(
    run: _Run, state: TrainState, watch: health.Watch, step_fn: train_step.StepFn
) -> TrainState:
    """Steps until the end of the stage, logging, evaluating and saving on the way."""
    job, plan = run.job, run.plan
    first = int(state.step)
    log = _Log(job, plan, watch, first)
    save = partial(_save, run, log)
    try:
        with _batches(job, plan, first + int(state.data_offset)) as batches:
            # None beyond the last step: a broken image there is no one's concern.
            wanted = itertools.islice(batches, plan.num_steps - first)
            placed = sharding.prefetch(wanted, job.mesh)
            for step, batch in enumerate(placed, start=first + 1):
                state, metrics = step_fn(state, batch)
                # The step before is fetched only now, while this one runs. Never far
                # ahead: several CPU devices that have 32 steps to come wait for each
                # other for ever.
                log.flush()
                log.add(step, metrics, batches.bad_images)
                evaluate = _due(step, plan.block.eval_every_steps, plan)
                if evaluate or _due(step, plan.block.checkpoint_every_steps, plan):
                    log.flush()
                    # Do not checkpoint while steps are being skipped.
                    if log.healthy or step == plan.num_steps:
                        try:
                            held_out = (
                                _evaluate(job, plan.name, state) if evaluate else None
                            )
                        except Interrupted:
                            save(state, None)
                            raise
                        log.evaluated(step, held_out)
                        save(state, held_out)
                number = job.stop.requested()
                if number:
                    log.flush()
                    if not log.healthy:
                        raise Interrupted(number, _NOT_KEPT)
                    save(state, None)
                    raise Interrupted(number)
            log.flush()
    finally:
        log.close()
    return state


# What a job says that was stopped while its steps were broken.
_NOT_KEPT = (
    "the latest steps were broken and are not saved; checkpoints before them are"
)


class _Log:
    """Metrics of the latest step on their way to screen and disk, one step late.

    Attributes:
      watch: what is remembered of the stage's steps, up to the last one flushed.
      healthy: whether the state after that step is one to go on from.
    """

    def __init__(self, job: Job, plan: Plan, watch: health.Watch, step: int):
        self._job, self._plan = job, plan
        self._line = ProgressLine(job.console, plan.name, step, plan.num_steps)
        self.watch, self.healthy = watch, True
        self._pending: tuple[int, Mapping[str, jax.Array], int] | None = None
        self._since, self._time = step, time.monotonic()
        self._t_max = plan.setting.t_max

    def close(self) -> None:
        self._line.close()

    def add(
        self,
        step: int,
        metrics: Mapping[str, jax.Array],
        bad_images: Mapping[str, tuple[str, ...]],
    ) -> None:
        self._pending = step, metrics, sum(map(len, bad_images.values()))

    def flush(self) -> None:
        """Looks at what is pending, and writes it if it is due.

        Raises:
          Diverged: too many steps were broken, or the network is dying.
          UserError: it is, and the config says to stop.
        """
        if self._pending is None:
            return
        step, metrics, bad_images = self._pending
        self._pending = None
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        # Looked at in every step: a rollback must not depend on what is logged.
        self.watch, signs = health.look(self.watch, values, self._plan.setting, step)
        if _due(step, self._job.config.log_every_steps, self._plan):
            self._write(step, values | {"bad_images": bad_images})
        self._judge(step, int(values["skipped_in_row"]), signs)

    def _judge(self, step: int, skipped: int, signs: Sequence[health.Sign]) -> None:
        """Tells the signs, and ends what cannot go on."""
        config, dying = self._job.config, [sign for sign in signs if sign.dying]
        heeded = config.on_dying != "note"
        self.healthy = skipped == 0 and not (heeded and self.watch.suspicious())
        for sign in signs:
            self._line.note(f"{self._plan.name} step {step}: {sign.text}")
        if signs:
            # Also where the job ends now; a rollback writes them again, further up.
            marks = {f"sign_{sign.name}": step for sign in signs}
            self._job.writer.write(self._plan.name, step, marks)
        if skipped >= config.max_skipped_in_row or (dying and heeded):
            raise Diverged(step, self.watch, dying if heeded else ())

    def _write(self, step: int, values: dict[str, float]) -> None:
        values["health_signs"] = self.watch.count
        now = time.monotonic()
        images = self._plan.block.batch_size * (step - self._since)
        values["images_per_second"] = images / max(now - self._time, 1e-9)
        self._since, self._time = step, now
        self._job.writer.write(self._plan.name, step, values)
        self._line.show(step, values)
        if values.get("T", 0) >= self._t_max > 0:
            self._line.note(f"{self._plan.name} step {step}: T has reached its maximum")
            self._t_max = 0  # said once

    def evaluated(self, step: int, held_out: Mapping[str, float] | None) -> None:
        """Writes a held-out evaluation, and leaves its time out of the speed."""
        if held_out is not None:
            record = {f"eval_{key}": value for key, value in held_out.items()}
            self._job.writer.write(self._plan.name, step, record)
            shown = "  ".join(f"{key} {value:.3f}" for key, value in held_out.items())
            self._line.note(f"{self._plan.name} step {step} held out: {shown}")
            self._since, self._time = step, time.monotonic()


def _save(
    run: _Run, log: _Log, state: TrainState, metrics: Mapping[str, float] | None
) -> None:
    job = run.job
    job.lock.check()
    # A job that goes on from here will not write again what came before.
    job.writer.flush()
    checkpoint.save(
        run.checkpoints,
        state,
        stage=run.plan.name,
        config=job.config,
        metrics=metrics,
        contrastive_steps=int(run.plan.stage.shown(state.extra).get("T", 0)),
        gaussian=job.gaussian,
        watch=asdict(log.watch),
        class_names=job.class_names,
    )


def _evaluate(job: Job, name: str, state: TrainState) -> dict[str, float]:
    # Whole for the time of the evaluation, whose loops run on them many times.
    variables = sharding.gather(train_step.average_variables(state), job.mesh)
    metrics = job.evaluate(name, int(state.step), variables)
    worst = {
        key: -math.inf if more else math.inf for key, more in checkpoint.BEST_BY.items()
    }
    # A comparison with NaN has no order: it counts as the worst.
    return {
        key: worst[key] if key in worst and math.isnan(value) else value
        for key, value in metrics.items()
    }


def _due(step: int, every: int, plan: Plan) -> bool:
    return step == plan.num_steps or (every > 0 and step % every == 0)


def _batches(job: Job, plan: Plan, start: int) -> data.Batches:
    """The training batches of a stage from a position on."""
    config = job.config.data
    # The same images in the same order for all methods that start from nothing.
    seed = 2 * job.config.seed + bool(plan.method.starts_from)
    train = job.sources["train"]
    streams = {"cls": data.Stream(train, config.augment_cls, seed=seed)}
    draw_seeds = None
    wanted = plan.method.streams
    if "gen" in wanted:
        streams["gen"] = data.Stream(train, config.augment_gen, seed=seed)
    if "ood" in wanted and job.gaussian is not None:
        draw_seeds = partial(job.gaussian.draw, _TRAINING_SEEDS + seed)
    elif "ood" in wanted and "seeds" in job.sources:
        streams["ood"] = data.Stream(
            job.sources["seeds"], config.augment_seeds, seed=seed, labels=False
        )
    return data.train_batches(
        streams,
        batch_size=plan.block.batch_size,
        image_shape=tuple(config.image_shape),
        start=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_workers=config.num_workers,
        num_threads=config.num_threads,
        max_bad_images=config.max_bad_images,
        draw_seeds=draw_seeds,
    )


def _rolled_back(
    run: _Run, state: TrainState, position: int, *, rollbacks: int
) -> TrainState:
    """A good state, with data from `position` on instead of the same again."""
    job, step = run.job, int(state.step)
    factor = job.config.rollback_learning_rate_factor
    say(
        job.console,
        f"{run.plan.name} diverged at data position {position}: rolled back to step "
        f"{step}, going on with the data after it and {factor:g} times the learning "
        f"rate ({rollbacks} of at most {job.config.max_rollbacks} rollbacks)",
    )
    counters = {
        "data_offset": jnp.asarray(position - step, jnp.int32),
        "rollbacks": jnp.asarray(rollbacks, jnp.int32),
    }
    return replace(state, **sharding.put_replicated(counters, job.mesh))


def _delete_dying(run: _Run, error: Diverged) -> None:
    """Deletes what was saved while the network was dying, signs still unseen.

    The first metrics that show a sign are of the state before them, and what led there
    went on for a while: a state is good once it was followed by steps without a sign.
    """
    run.checkpoints.wait_until_finished()
    since = min((sign.since for sign in error.signs), default=math.inf)
    for step in run.checkpoints.all_steps():
        if step >= since - health.PATIENCE:
            checkpoint.delete(run.checkpoints, step)
            say(
                run.job.console,
                f"{run.plan.name}: checkpoint {step}, of the dying network, is deleted",
            )


def _reported(run: _Run, error: Diverged) -> dict[str, Any]:
    """Divergence as the result of a stage, for the report."""
    job, name, step = run.job, run.plan.name, error.step
    job.writer.write(name, step, error.marks())
    seen = "; ".join(sign.text for sign in error.signs) or _not_finite(job.config)
    say(job.console, f"{name} diverged at step {step} and ends here: {seen}")
    return {"stage": name, "step": step, "seen": seen}


def _not_finite(config: ml_collections.ConfigDict) -> str:
    steps = config.max_skipped_in_row
    return f"loss or gradient was NaN or Inf in {steps} steps in a row"


def _check_rollbacks(
    config: ml_collections.ConfigDict, name: str, error: Diverged, rollbacks: int
) -> None:
    """Refuses to roll back where the config says so, or once more than it allows.

    Raises:
      UserError: says what was seen, the likely cause and the remedy.
    """
    seen = "; ".join(sign.text for sign in error.signs)
    if seen and config.on_dying == "stop":
        raise UserError(
            f"{name} stopped at step {error.step}: {seen}. Lower it in a new workdir, "
            "or let config.on_dying=rollback do so."
        )
    if rollbacks <= config.max_rollbacks:
        return
    again = f"again after {rollbacks - 1} rollbacks"
    if seen:
        raise UserError(
            f"{name} keeps diverging, {again}: {seen}. Lower it in a new workdir."
        )
    growth = f", or T's growth by a higher config.{name}.auc_threshold,"
    raise UserError(
        f"{name} keeps diverging: {_not_finite(config)}, {again}. Lower "
        f"config.{name}.learning_rate{growth * STAGES[name].curriculum} in a new "
        "workdir."
    )
