"""Held-out evaluation of a job: while it trains, and for its report."""

import importlib.metadata
import platform
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh
from rich.console import Console

from atebm_jax import checkpoint, data, sharding
from atebm_jax.evaluate import accuracy, plots, report, samples
from atebm_jax.preemption import StopSignal
from atebm_jax.reporting import read_metrics


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
            self._grid(
                self._workdir / "samples" / f"{stage}_{step:08d}.png",
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
        if result is None or not self._holds(result, steps):
            result = self._measure(folders)
        if jax.process_index() == 0:
            report.show(console, result)
            console.print(f"report, pictures and checkpoints are in {self._workdir}")
        return result

    def _holds(self, result: dict[str, Any], steps: dict[str, int]) -> bool:
        """Whether an earlier report is of these steps and settings."""
        known = {name: figures["step"] for name, figures in result["stages"].items()}
        settings = self._settings()
        return known == steps and {k: result.get(k) for k in settings} == settings

    def _settings(self) -> dict[str, Any]:
        config = checkpoint.as_json(self._config)
        return {
            "seed": config["seed"],
            "data": {k: config["data"][k] for k in ("train", "eval", "test", "seeds")},
            "evaluate": config["evaluate"],
        }

    def _measure(self, folders: dict[str, epath.Path]) -> dict[str, Any]:
        settings = self._config.evaluate
        stages: dict[str, dict[str, Any]] = {}
        drawn = {}
        for stage, folder in folders.items():
            weights, meta = checkpoint.load_weights(folder, together=True)
            variables = sharding.put_replicated(weights, self._mesh)
            figures = self._accuracy("test", variables, settings.num_test_examples)
            drawn[stage] = self._draw(variables, settings.samples.num_test)
            figures |= samples.score(self._fitted_reference(), *drawn[stage])
            reached = {"T": meta["T"]} if stage == "stage2" else {}
            stages[stage] = {"step": meta["step"], **reached, **figures}
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
        settings = self._config.evaluate
        real, labels = self._images("test", settings.samples.num_test)
        return {
            "stages": stages,
            "real_test": samples.score(self._fitted_reference(), real, labels),
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
            self._seed_images = self._seeds()
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

    def _seeds(self) -> np.ndarray:
        settings = self._config.data
        return data.seed_images(
            self._sources["seeds"],
            settings.preprocess_seeds,
            tuple(settings.image_shape),
            self._config.evaluate.samples.num_test,
            settings.max_bad_images,
        )[0]

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
