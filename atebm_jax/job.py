"""One job from config to report: stage 1, stage 2, evaluation, sampling."""

import importlib.metadata
import json
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from atebm_jax import checkpoint, data, models, sharding
from atebm_jax import config as configuration
from atebm_jax.errors import UserError
from atebm_jax.evaluate import samples
from atebm_jax.evaluate.evaluation import Evaluation
from atebm_jax.preemption import StopSignal
from atebm_jax.reporting import MetricWriter, replace_text
from atebm_jax.stages import classifier_adversary
from atebm_jax.train import Job, build_step, train_stage


def run(
    config: ml_collections.ConfigDict,
    workdir: str | epath.Path,
    *,
    allow_config_change: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs a job to its end, or goes on with it from where it stopped.

    Args:
      config: a complete config (`config.default`).
      workdir: folder for everything the job writes; made if it is not there.
      allow_config_change: go on with a workdir that was made by another config.
      console: where to show progress and table; default the terminal.

    Returns:
      The report, as in `report.json`.

    Raises:
      UserError: config, data, checkpoint or workdir cannot be used, or training
        keeps diverging.
      preemption.Interrupted: a signal asked to stop; everything is saved.
    """
    configuration.check(config)
    console = console or Console()
    mesh = sharding.make_mesh()
    model = models.build(config.model)
    sources = _open_sources(config)
    workdir = checkpoint.absolute(workdir)
    # Everything that can be refused is refused before anything is written.
    _check_rooms(config, mesh, model, len(sources["train"]))
    _check_images(config, sources)
    origins = _origins(config, workdir, model)
    _claim(workdir, config, allow_config_change)
    stop = StopSignal()
    writer = MetricWriter(workdir)
    try:
        evaluation = Evaluation(config, workdir, mesh, model, sources, stop)
        training = {k: v for k, v in sources.items() if k in ("train", "seeds")}
        job = Job(
            config=config,
            workdir=workdir,
            mesh=mesh,
            model=model,
            sources=training,
            evaluate=evaluation.periodic,
            writer=writer,
            console=console,
            stop=stop,
        )
        _greet(console, job)
        for name in configuration.stages_to_run(config):
            train_stage(job, name, origins[name])
        return evaluation.final(console)
    finally:
        writer.close()
        stop.restore()


def _open_sources(config: ml_collections.ConfigDict) -> dict[str, data.Source]:
    """The data sets of a job by role; equal specs are opened once."""
    opened: dict[str, data.Source] = {}
    sources = {}
    for role in ("train", "eval", "test", "seeds"):
        spec = config.data[role]
        if role == "seeds" and spec == "noise":
            continue
        if spec not in opened:
            opened[spec] = data.open_source(spec, config.data.data_dir)
        sources[role] = opened[spec]
        classes = sources[role].num_classes
        if role != "seeds" and classes != config.model.num_classes:
            raise UserError(
                f"config.data.{role}={spec} has {classes or 'no'} classes and "
                f"config.model.num_classes is {config.model.num_classes}: they must "
                "be the same."
            )
    return sources


def _check_rooms(
    config: ml_collections.ConfigDict, mesh: Mesh, model: nn.Module, num_train: int
) -> None:
    """Has every room check its part of the config."""
    sizes = {"evaluate.batch_size": config.evaluate.batch_size}
    for name in configuration.stages_to_run(config):
        total = configuration.num_steps(config[name], num_train)
        build_step(config, name, model, total)
        sizes[f"{name}.batch_size"] = config[name].batch_size
    for field, size in sizes.items():
        sharding.check_batch_size(size, mesh, f"config.{field}")
    classifier_adversary(config.evaluate.attack)
    samples.check_judge(config.evaluate.samples.judge)


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
            data.parse(operations)
            if role not in sources:
                continue
            try:
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


def _claim(
    workdir: epath.Path, config: ml_collections.ConfigDict, allow_change: bool
) -> None:
    """Makes the workdir, or refuses one that another config has made."""
    path = workdir / "config.json"
    now = checkpoint.as_json(config)
    if path.exists() and not allow_change:
        changed = configuration.differences(json.loads(path.read_text()), now)
        if changed:
            raise UserError(
                f"workdir {workdir} was made by another config: "
                f"{'; '.join(changed)}. Give the same config, another --workdir, or "
                "--allow_config_change to go on with this one."
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            replace_text(path, json.dumps(now, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written: {error}.") from error


def _greet(console: Console, job: Job) -> None:
    if jax.process_index() != 0:
        return
    variables = jax.eval_shape(lambda: _random_variables(job.model, job.config))
    number = parameter_overview.count_parameters(variables["params"])
    config = job.config.model
    size = (
        f"-{config.depth}-{config.widen_factor}" if config.name == "wide_resnet" else ""
    )
    console.print(
        f"atebm_jax {importlib.metadata.version('atebm_jax')}: {config.name}{size}, "
        f"{number:,} parameters, {config.dtype}, on {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}; workdir {job.workdir}",
        highlight=False,
        soft_wrap=True,
    )


def _random_variables(model: nn.Module, config: ml_collections.ConfigDict) -> Any:
    shape = (1, *config.data.image_shape)
    return model.init(jax.random.key(config.seed), jnp.zeros(shape))


def _origins(
    config: ml_collections.ConfigDict, workdir: epath.Path, model: nn.Module
) -> dict[str, Callable[[], Any]]:
    """For each stage what makes the variables that it starts from.

    The first stage starts from `init_from` or at random; stage 2 otherwise from the
    averaged weights of stage 1 in the workdir.
    """
    expected = jax.eval_shape(lambda: _random_variables(model, config))

    def loaded(source: str | epath.Path) -> Any:
        weights, _ = checkpoint.load_weights(source)
        weights = {k: v for k, v in weights.items() if v or k in expected}
        checkpoint.check_weights(expected, weights, str(source))
        return weights

    stage1 = checkpoint.stage_folder(workdir, "stage1")
    origins: dict[str, Callable[[], Any]] = {
        "stage1": jax.jit(lambda: _random_variables(model, config)),
        "stage2": lambda: loaded(stage1),
    }
    first = configuration.stages_to_run(config)[0]
    if config.init_from:
        loaded(config.init_from)
        origins[first] = lambda: loaded(config.init_from)
    elif first == "stage2" and not checkpoint.steps_in(stage1):
        raise UserError(
            f"stage2 starts from the weights of stage1 and {workdir} has none: run "
            "stage1 there first, or give --config.init_from=CHECKPOINT."
        )
    return origins
