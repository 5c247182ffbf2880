"""Held-out evaluation of a job: while it trains, and for its report."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from atebm_jax import checkpoint, drawing, pictures, recipes, sharding
from atebm_jax import config as configuration
from atebm_jax.data import Source
from atebm_jax.evaluate import classification, cost, pixel_scores, report
from atebm_jax.evaluate.context import Context, Options
from atebm_jax.metric_writer import read_metrics
from atebm_jax.preemption import StopSignal
from atebm_jax.progress import ShowFn, parts, say
from atebm_jax.reachability import Reachability, of_config
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
        sources: dict[str, Source],
        stop: StopSignal,
        gaussian: Gaussian | None = None,
    ):
        self._config, self._workdir, self._stop = config, workdir, stop
        # Without a store: an interrupted evaluation begins again.
        self._context = Context(config, model, None, mesh, sources, gaussian=gaussian)
        attacked = classification.under_attack(config.evaluate.attack)
        self._attacked = self._context.compiled(attacked)
        self._recipe = recipes.of_config(config.evaluate.samples, seed=config.seed)
        self._seeds_of = self._context.seeds_fn(config.seed)

    def periodic(self, stage: str, step: int, variables: Any) -> dict[str, float]:
        """Figures on `data.eval` and a grid of samples, with averaged weights."""
        settings = self._config.evaluate
        limit, num = settings.num_examples, settings.samples.num
        tell = self._told(lambda part, done, total: None, stage)
        figures, drawn = self._evaluate("eval", variables, limit, num, tell)
        path = self._workdir / "samples" / f"{stage}_{step:08d}.png"
        self._context.sample_grid(path, {f"{stage}, step {step}": drawn})
        del figures["num_examples"]
        return figures

    def final(
        self, console: Console, diverged: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Evaluates each stage's last weights on `data.test`; writes the report.

        `diverged` is what `train.train_stage` says of a stage that ended so.
        """
        folders = {s: checkpoint.stage_folder(self._workdir, s) for s in STAGES}
        found = {stage: checkpoint.steps_in(f) for stage, f in folders.items()}
        last = {stage: steps[-1] for stage, steps in found.items() if steps}
        result = report.read_stages(self._workdir)
        ended = {"diverged": diverged} if diverged else {}
        if result is None or not self._holds(result, last, ended):
            if last:
                say(console, self.cost_of_final(list(last)))
            with parts(console) as show:
                evaluated = {stage: folders[stage] for stage in last}
                result = self._measure(evaluated, ended, show)
        if jax.process_index() == 0:
            report.show_stages(console, result)
            say(console, f"report, pictures and checkpoints are in {self._workdir}")
        return result

    def _holds(
        self, result: dict[str, Any], steps: dict[str, int], ended: dict[str, Any]
    ) -> bool:
        """Whether an earlier report is of these steps and settings."""
        known = {name: figures["step"] for name, figures in result["stages"].items()}
        settings = self._settings() | {"diverged": ended.get("diverged")}
        return known == steps and {k: result.get(k) for k in settings} == settings

    def _settings(self) -> dict[str, Any]:
        config = checkpoint.as_json(self._config)
        config["evaluate"]["samples"]["sampler"] = self._recipe.sampler
        return {
            "seed": config["seed"],
            "data": {k: config["data"][k] for k in ("train", "eval", "test", "seeds")},
            "evaluate": config["evaluate"],
        }

    def cost_of_periodic(self, stage: str, total: int) -> str | None:
        """A sentence where evaluations while a stage trains cost much."""
        num_eval = len(self._context.sources["eval"])
        return cost.of_periodic(self._config, stage, total, num_eval)

    def cost_of_final(self, stages: list[str]) -> str:
        """What the evaluation at the end of a job costs, in a sentence."""
        num_test = len(self._context.sources["test"])
        records = read_metrics(self._workdir)
        return cost.of_final(self._config, stages, num_test, records)

    @functools.cached_property
    def reachability(self) -> Reachability | None:
        """How far seeds are from training images, and how far steps go.

        Of the first stage to run that has a curriculum; None without one.
        """
        for name in configuration.stages_to_run(self._config):
            if STAGES[name].curriculum:
                context = self._context
                return of_config(self._config, context.sources, name, context.gaussian)
        return None

    def _measure(
        self, folders: dict[str, epath.Path], ended: dict[str, Any], show: ShowFn
    ) -> dict[str, Any]:
        settings = self._config.evaluate
        limit, num = settings.num_test_examples, settings.samples.num_test
        stages: dict[str, dict[str, Any]] = {}
        grids = {}
        for stage, folder in folders.items():
            weights, meta = checkpoint.load_weights(folder, together=True)
            variables = sharding.put_replicated(weights, self._context.mesh)
            tell = self._told(show, stage)
            figures, drawn = self._evaluate("test", variables, limit, num, tell)
            reached = {"T": meta["T"]} if STAGES[stage].curriculum else {}
            stages[stage] = {"step": meta["step"], **reached, **figures}
            grids[f"samples after {stage}"] = drawn
        result = ended | self._describe(stages)
        if jax.process_index() == 0:
            if grids:
                self._context.sample_grid(self._workdir / "samples.png", grids)
            records = read_metrics(self._workdir)
            pictures.training_curves(self._workdir / "curves.png", records)
            report.write_stages(self._workdir, result)
        return result

    def _told(self, show: ShowFn, stage: str) -> ShowFn:
        """Shows the progress of a stage's parts, and raises where the job shall end."""

        def tell(part: str, done: int, total: int) -> None:
            show(f"{stage} {part}", done, total)
            self._stop.check()

        return tell

    def _describe(self, stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
        num_test = self._config.evaluate.samples.num_test
        real, labels = self._context.images("test", num_test)
        reached = {}
        if self.reachability is not None:
            reached["reachability"] = self.reachability._asdict()
        return {
            "stages": stages,
            **reached,
            "real_test": pixel_scores.score(self._reference, real, labels),
            **self._settings(),
            **report.made_with("jax", "flax", "optax", "numpy"),
            "notes": self._notes(stages),
        }

    def _notes(self, stages: dict[str, dict[str, Any]]) -> list[str]:
        attack, sample = self._config.evaluate.attack, self._config.evaluate.samples
        read = self._context.sources.get("seeds")
        seeds = self._config.data.seeds if read is None else read.spec
        robust = (
            f"robust: {attack.num_steps}-step PGD, {attack.norm} radius "
            f"{attack.epsilon:g}, step {attack.step_size:g}, momentum "
            f"{attack.momentum:g}, {'best' if attack.keep_best else 'last'} iterate, "
            "averaged weights."
        )
        drawn = (
            f"samples: {sample.num_test}, {sample.num_steps} steps of "
            f"{sample.step_size:g} by {self._recipe.sampler} from "
            f"{'uniform noise' if seeds == 'noise' else seeds}; distance: Frechet on "
            f"{self._reference.pca.n_components_} principal components of the training "
            "pixels (not FID)."
        )
        return [robust, drawn, *augmentation_notes(self._config, list(stages))]

    def _evaluate(
        self, role: str, variables: Any, limit: int, num: int, show: ShowFn
    ) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
        """Figures of averaged weights, and the samples that they are of.

        Returns:
          (figures, (images [num, H, W, C] float32 in [0, 1], labels [num] int32)).
        """
        options = Options(num_examples=limit)
        context = replace(
            self._context, variables=variables, options=options, show=show
        )
        make = functools.partial(context.rows, self._attacked)
        rows = context.over_batches("accuracy", role, context.store, make)
        labels_of = drawing.cyclic_labels(self._config.model.num_classes)
        images = drawing.images(
            context.model,
            variables,
            self._recipe,
            num,
            labels_of,
            self._seeds_of,
            together=True,
            show=functools.partial(show, "samples"),
        )
        drawn = images, labels_of(np.arange(num))
        figures = {
            "num_examples": len(rows["labels"]),
            "clean_accuracy": float(rows["clean"].mean()),
            "robust_accuracy": float(rows["robust"].mean()),
            **pixel_scores.score(self._reference, *drawn),
        }
        return figures, drawn

    @functools.cached_property
    def _reference(self) -> pixel_scores.Reference:
        settings = self._config.evaluate.samples
        images, labels = self._context.images("train", settings.num_reference)
        return pixel_scores.make_reference(images, labels, settings)


def augmentation_notes(
    config: ml_collections.ConfigDict, stages: Sequence[str]
) -> list[str]:
    """Of which stages not all of the gain is that of the energy."""
    weaker, strong = config.data.augment_gen, config.data.augment_cls
    notes = []
    for name in stages:
        before = STAGES[name].starts_from
        both = before in stages and "gen" in STAGES[name].streams
        if both and "gen" not in STAGES[before].streams and weaker != strong:
            later, earlier = (x.replace("stage", "stage ") for x in (name, before))
            notes.append(
                f"{later.capitalize()} also sees the training images under the weaker "
                f"augmentation of the generative batch ({weaker or 'none'} instead of "
                f"{strong}): part of its gain over {earlier} comes from that."
            )
    return notes
