"""Held-out evaluation of a job: while it trains, and for its report."""

import functools
import importlib.metadata
import platform
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from atebm_jax import (
    ascent,
    checkpoint,
    data,
    drawing,
    pictures,
    reachability,
    recipes,
    sharding,
)
from atebm_jax import config as configuration
from atebm_jax.evaluate import classification, cost, pixel_scores, report
from atebm_jax.evaluate.context import Context, Options
from atebm_jax.evaluate.store import Store
from atebm_jax.metric_writer import read_metrics
from atebm_jax.preemption import StopSignal
from atebm_jax.progress import ShowFn, parts, say
from atebm_jax.seeds import Gaussian
from atebm_jax.stages import STAGES


class Evaluation:
    """Held-out evaluation of a job; compiles and fits its references once, lazily."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: epath.Path,
        mesh: Mesh,
        model: nn.Module,
        sources: dict[str, data.Source],
        stop: StopSignal,
        gaussian: Gaussian | None = None,
    ):
        self._config, self._workdir = config, workdir
        self._sources, self._stop = sources, stop
        self._context = Context(
            config=config,
            model=model,
            variables=None,
            mesh=mesh,
            sources=sources,
            fingerprints={},
            store=Store(None, {}),
            options=Options(),
        )
        attacked = classification.under_attack(config.evaluate.attack)
        self._attacked = self._context.compiled(attacked)
        self._recipe = recipes.of_config(config.evaluate.samples, seed=config.seed)
        self._seeds_of = drawing.seeds_fn(
            config.data.seeds,
            config.seed,
            config.data,
            gaussian=gaussian,
            source=sources.get("seeds"),
        )
        self._gaussian = gaussian
        self._reference: pixel_scores.Reference | None = None
        self._reachability: reachability.Reachability | None = None

    def periodic(self, stage: str, step: int, variables: Any) -> dict[str, float]:
        """Figures on `data.eval` and a grid of samples, with averaged weights."""
        settings = self._config.evaluate
        tell = self._told(lambda part, done, total: None, stage)
        figures = self._accuracy("eval", variables, settings.num_examples, tell)
        images, labels = self._draw(variables, settings.samples.num, tell)
        if jax.process_index() == 0:
            self._grid(
                self._workdir / "samples" / f"{stage}_{step:08d}.png",
                {f"{stage}, step {step}": (images, labels)},
            )
        figures |= pixel_scores.score(self._fitted_reference(), images, labels)
        del figures["num_examples"]
        return figures

    def final(self, console: Console) -> dict[str, Any]:
        """Evaluates each stage's last weights on `data.test`; writes the report."""
        folders = {
            stage: folder
            for stage in STAGES
            if checkpoint.steps_in(
                folder := checkpoint.stage_folder(self._workdir, stage)
            )
        }
        result = report.read_stages(self._workdir)
        steps = {stage: checkpoint.steps_in(f)[-1] for stage, f in folders.items()}
        if result is None or not self._holds(result, steps):
            say(console, self.cost_of_final(list(folders)))
            with parts(console) as show:
                result = self._measure(folders, show)
        if jax.process_index() == 0:
            report.show_stages(console, result)
            say(console, f"report, pictures and checkpoints are in {self._workdir}")
        return result

    def _holds(self, result: dict[str, Any], steps: dict[str, int]) -> bool:
        """Whether an earlier report is of these steps and settings."""
        known = {name: figures["step"] for name, figures in result["stages"].items()}
        settings = self._settings()
        return known == steps and {k: result.get(k) for k in settings} == settings

    def _settings(self) -> dict[str, Any]:
        config = checkpoint.as_json(self._config)
        drawn = config["evaluate"]["samples"]
        drawn["sampler"] = ascent.resolved(drawn["sampler"])
        return {
            "seed": config["seed"],
            "data": {k: config["data"][k] for k in ("train", "eval", "test", "seeds")},
            "evaluate": config["evaluate"],
        }

    def cost_of_periodic(self, stage: str, total: int) -> str | None:
        """A sentence where evaluations while a stage trains cost much."""
        num_eval = len(self._sources["eval"])
        return cost.of_periodic(self._config, stage, total, num_eval)

    def cost_of_final(self, stages: list[str]) -> str:
        """What the evaluation at the end of a job costs, in a sentence."""
        return cost.of_final(
            self._config,
            stages,
            len(self._sources["test"]),
            read_metrics(self._workdir),
        )

    def measured_reachability(self) -> reachability.Reachability:
        """How far seeds are from training images, and how far steps go."""
        if self._reachability is None:
            self._reachability = reachability.of_config(
                self._config, self._sources, self._gaussian
            )
        return self._reachability

    def _measure(self, folders: dict[str, epath.Path], show: ShowFn) -> dict[str, Any]:
        settings = self._config.evaluate
        stages: dict[str, dict[str, Any]] = {}
        drawn = {}
        for stage, folder in folders.items():
            weights, meta = checkpoint.load_weights(folder, together=True)
            variables = sharding.put_replicated(weights, self._context.mesh)
            tell, limit = self._told(show, stage), settings.num_test_examples
            figures = self._accuracy("test", variables, limit, tell)
            drawn[stage] = self._draw(variables, settings.samples.num_test, tell)
            figures |= pixel_scores.score(self._fitted_reference(), *drawn[stage])
            reached = {"T": meta["T"]} if "ood" in STAGES[stage].streams else {}
            stages[stage] = {"step": meta["step"], **reached, **figures}
        result = self._describe(stages)
        if jax.process_index() == 0:
            titles = {f"samples after {stage}": drawn[stage] for stage in drawn}
            self._grid(self._workdir / "samples.png", titles)
            pictures.training_curves(
                self._workdir / "curves.png", read_metrics(self._workdir)
            )
            report.write_stages(self._workdir, result)
        return result

    def _told(self, show: ShowFn, stage: str) -> ShowFn:
        """Shows the progress of a stage's parts, and raises where the job shall end."""

        def tell(part: str, done: int, total: int) -> None:
            show(f"{stage} {part}", done, total)
            self._stop.check()

        return tell

    def _describe(self, stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
        settings = self._config.evaluate
        real, labels = self._images("test", settings.samples.num_test)
        reached = {}
        to_run = configuration.stages_to_run(self._config)
        if any("ood" in STAGES[name].streams for name in to_run):
            reached = {"reachability": self.measured_reachability()._asdict()}
        return {
            "stages": stages,
            **reached,
            "real_test": pixel_scores.score(self._fitted_reference(), real, labels),
            **self._settings(),
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
        read = self._sources.get("seeds")
        seeds = self._config.data.seeds if read is None else read.spec
        components = self._fitted_reference().pca.n_components_
        robust = (
            f"robust: {attack.num_steps}-step PGD, {attack.norm} radius "
            f"{attack.epsilon:g}, step {attack.step_size:g}, momentum "
            f"{attack.momentum:g}, {'best' if attack.keep_best else 'last'} iterate, "
            "averaged weights."
        )
        drawn = (
            f"samples: {sample.num_test}, {sample.num_steps} steps of "
            f"{sample.step_size:g} by {ascent.resolved(sample.sampler)} from "
            f"{'uniform noise' if seeds == 'noise' else seeds}; distance: Frechet on "
            f"{components} principal components of the training pixels (not FID)."
        )
        return [robust, drawn, *_gain_note(self._config, stages)]

    def _accuracy(
        self, role: str, variables: Any, limit: int, show: ShowFn
    ) -> dict[str, float]:
        options = Options(num_examples=limit)
        context = replace(
            self._context, variables=variables, options=options, show=show
        )
        rows = context.over_batches(
            "accuracy",
            role,
            context.store,
            lambda batch: context.rows(self._attacked, batch),
        )
        return {
            "num_examples": len(rows["labels"]),
            "clean_accuracy": float(rows["clean"].mean()),
            "robust_accuracy": float(rows["robust"].mean()),
        }

    def _draw(
        self, variables: Any, num: int, show: ShowFn
    ) -> tuple[np.ndarray, np.ndarray]:
        """Samples [num, H, W, C] float32 in [0, 1] and their labels [num] int32."""
        labels_of = drawing.cyclic_labels(self._config.model.num_classes)
        images = drawing.images(
            self._context.model,
            variables,
            self._recipe,
            num,
            labels_of,
            self._seeds_of,
            together=True,
            show=functools.partial(show, "samples"),
        )
        return images, labels_of(np.arange(num))

    def _fitted_reference(self) -> pixel_scores.Reference:
        if self._reference is None:
            settings = self._config.evaluate.samples
            images, labels = self._images("train", settings.num_reference)
            self._reference = pixel_scores.make_reference(images, labels, settings)
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
        pictures.sample_grid(
            path,
            blocks,
            num_classes=self._config.model.num_classes,
            num_rows=self._config.evaluate.samples.grid_rows,
            class_names=self._sources["test"].class_names,
        )


def _gain_note(config: ml_collections.ConfigDict, stages: dict[str, Any]) -> list[str]:
    """Says what part of stage 2's gain is not the energy's, where there is one."""
    if len({"gen" in STAGES[name].streams for name in stages}) < 2:
        return []
    if config.data.augment_gen == config.data.augment_cls:
        return []
    gain = (
        "Stage 2 also sees the training images under the weaker augmentation of the "
        f"generative batch ({config.data.augment_gen or 'none'} instead of "
        f"{config.data.augment_cls}): part of its gain over stage 1 comes from that."
    )
    return [gain]
