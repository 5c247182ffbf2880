"""One job from config to report: stage 1, stage 2, evaluation, sampling."""

import importlib.metadata
import json
import platform
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from atebm_jax import checkpoint, data, models, sharding
from atebm_jax import config as configuration
from atebm_jax.errors import UserError
from atebm_jax.evaluate import accuracy, plots, report, samples
from atebm_jax.preemption import StopSignal
from atebm_jax.reporting import MetricWriter, read_metrics, replace_text
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
    workdir = epath.Path(workdir)
    # Everything that can be refused is refused before anything is written.
    _check_rooms(config, mesh, model, len(sources["train"]))
    origins = _origins(config, workdir, model)
    _claim(workdir, config, allow_config_change)
    stop = StopSignal()
    writer = MetricWriter(workdir)
    try:
        evaluation = _Evaluation(config, workdir, mesh, model, sources, stop)
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
    for field in ("augment_gen", "augment_cls", "augment_seeds", "preprocess"):
        data.parse(config.data[field])
    classifier_adversary(config.evaluate.attack)
    samples.check_judge(config.evaluate.samples.judge)


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


class _Evaluation:
    """Held-out evaluation of a job; compiles and fits its references once, lazily."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: epath.Path,
        mesh: Mesh,
        model: nn.Module,
        sources: dict[str, data.Source],
        stop: StopSignal,
    ):
        self._config, self._workdir, self._mesh = config, workdir, mesh
        self._model, self._sources, self._stop = model, sources, stop
        self._count = accuracy.make_counter(model, config.evaluate.attack, mesh)
        self._sample = samples.make_sampler(model, config.evaluate.samples, mesh)
        self._reference: samples.Reference | None = None
        self._seed_images: np.ndarray | None = None

    def periodic(self, stage: str, step: int, variables: Any) -> dict[str, float]:
        """Figures on `data.eval` and a grid of samples, with averaged weights."""
        settings = self._config.evaluate
        figures = self._accuracy("eval", variables, settings.num_examples)
        images, labels = self._draw(variables, settings.samples.num)
        if jax.process_index() == 0:
            folder = self._workdir / "samples"
            folder.mkdir(exist_ok=True)
            self._grid(
                folder / f"{stage}_{step:08d}.png",
                {f"{stage}, step {step}": (images, labels)},
            )
        figures |= samples.score(self._fitted_reference(), images, labels)
        del figures["num_examples"]
        return figures

    def final(self, console: Console) -> dict[str, Any]:
        """Evaluates each stage's last weights on `data.test`; writes the report."""
        folders = {
            stage: folder
            for stage in checkpoint.STAGE_ORDER
            if checkpoint.steps_in(
                folder := checkpoint.stage_folder(self._workdir, stage)
            )
        }
        result = report.read(self._workdir)
        steps = {stage: checkpoint.steps_in(f)[-1] for stage, f in folders.items()}
        known = {} if result is None else result["stages"]
        if result is None or steps != {k: v["step"] for k, v in known.items()}:
            result = self._measure(folders)
        if jax.process_index() == 0:
            report.show(console, result)
            console.print(f"report, pictures and checkpoints are in {self._workdir}")
        return result

    def _measure(self, folders: dict[str, epath.Path]) -> dict[str, Any]:
        settings = self._config.evaluate
        stages: dict[str, dict[str, Any]] = {}
        drawn = {}
        for stage, folder in folders.items():
            weights, meta = checkpoint.load_weights(folder)
            variables = sharding.put_replicated(weights, self._mesh)
            figures = self._accuracy("test", variables, settings.num_test_examples)
            drawn[stage] = self._draw(variables, settings.samples.num_test)
            figures |= samples.score(self._fitted_reference(), *drawn[stage])
            stages[stage] = {"step": meta["step"], **figures}
        result = self._describe(stages)
        if jax.process_index() == 0:
            titles = {f"samples after {stage}": drawn[stage] for stage in drawn}
            self._grid(self._workdir / "samples.png", titles)
            plots.training_curves(
                self._workdir / "curves.png", read_metrics(self._workdir)
            )
            report.write(self._workdir, result)
        return result

    def _describe(self, stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
        config = self._config
        settings = config.evaluate
        real, labels = self._images("test", settings.samples.num_test)
        attack, sample = settings.attack, settings.samples
        return {
            "stages": stages,
            "real_test": samples.score(self._fitted_reference(), real, labels),
            "seed": config.seed,
            "data": {k: config.data[k] for k in ("train", "eval", "test", "seeds")},
            "attack": checkpoint.as_json(attack),
            "samples": checkpoint.as_json(sample),
            "versions": {
                "python": platform.python_version(),
                **{
                    name: importlib.metadata.version(name)
                    for name in ("atebm_jax", "jax", "flax", "optax", "numpy")
                },
            },
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "notes": self._notes(stages),
        }

    def _notes(self, stages: dict[str, dict[str, Any]]) -> list[str]:
        attack, sample = self._config.evaluate.attack, self._config.evaluate.samples
        seeds = self._config.data.seeds
        components = self._fitted_reference().pca.n_components_
        robust = (
            f"robust: {attack.num_steps}-step PGD, {attack.norm} radius "
            f"{attack.epsilon:g}, step {attack.step_size:g}, averaged weights."
        )
        drawn = (
            f"samples: {sample.num_test}, {sample.num_steps} steps of "
            f"{sample.step_size:g} from "
            f"{'uniform noise' if seeds == 'noise' else seeds}; distance: Frechet on "
            f"{components} principal components of the training pixels (not FID)."
        )
        return [robust, drawn, *_gain_note(self._config, stages)]

    def _accuracy(self, role: str, variables: Any, limit: int) -> dict[str, float]:
        settings = self._config.data
        with data.eval_batches(
            self._sources[role],
            preprocess=settings.preprocess,
            batch_size=self._config.evaluate.batch_size,
            image_shape=tuple(settings.image_shape),
            limit=limit or None,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=settings.num_threads,
            max_bad_images=settings.max_bad_images,
        ) as batches:
            return accuracy.accuracy(
                self._count, variables, batches, self._mesh, self._stop.check
            )

    def _draw(self, variables: Any, num: int) -> tuple[np.ndarray, np.ndarray]:
        if "seeds" in self._sources and self._seed_images is None:
            self._seed_images = self._images(
                "seeds", self._config.evaluate.samples.num_test
            )[0]
        return samples.draw(
            self._sample,
            variables,
            num=num,
            num_classes=self._config.model.num_classes,
            image_shape=tuple(self._config.data.image_shape),
            batch_size=self._config.evaluate.batch_size,
            seed=self._config.seed,
            mesh=self._mesh,
            seed_images=self._seed_images,
            check_stop=self._stop.check,
        )

    def _fitted_reference(self) -> samples.Reference:
        if self._reference is None:
            settings = self._config.evaluate.samples
            images, labels = self._images("train", settings.num_reference)
            self._reference = samples.make_reference(images, labels, settings)
        return self._reference

    def _images(self, role: str, limit: int) -> tuple[np.ndarray, np.ndarray]:
        settings = self._config.data
        return data.materialise(
            self._sources[role],
            settings.preprocess,
            tuple(settings.image_shape),
            limit,
            settings.max_bad_images,
        )

    def _grid(
        self, path: epath.Path, blocks: dict[str, tuple[np.ndarray, np.ndarray]]
    ) -> None:
        plots.sample_grid(
            path,
            blocks,
            num_classes=self._config.model.num_classes,
            num_rows=self._config.evaluate.samples.grid_rows,
            class_names=self._sources["test"].class_names,
        )


def _gain_note(config: ml_collections.ConfigDict, stages: dict[str, Any]) -> list[str]:
    """Says what part of stage 2's gain is not the energy's, where there is one."""
    if set(stages) != {"stage1", "stage2"}:
        return []
    if config.data.augment_gen == config.data.augment_cls:
        return []
    gain = (
        "Stage 2 also sees the training images under the weaker augmentation of the "
        f"generative batch ({config.data.augment_gen or 'none'} instead of "
        f"{config.data.augment_cls}): part of its gain over stage 1 comes from that."
    )
    return [gain]
