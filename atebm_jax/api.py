"""The Python interface: a trained model with numpy in, numpy out, batched inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from atebm_jax import (
    attacks,
    constraints,
    drawing,
    editing,
    energy,
    models,
    recipes,
    trained,
)
from atebm_jax.command_line import check_platform
from atebm_jax.editing import Edited
from atebm_jax.errors import UserError
from atebm_jax.seeds import NOISE, seeds_fn


def load(
    path: str | epath.Path, *, best_by: str | None = None, batch_size: int = 128
) -> Model:
    """Loads a trained model with its averaged weights.

    Args:
      path: a workdir (last step of its last stage), a stage's folder or one step's, a
        release, or the name of one: "zoo:digits" and "zoo:cifar10" are part of the
        package, "hf:OWNER/NAME" is on a hub.
      best_by: instead of the last step the best one by "robust_accuracy" or
        "sample_distance".
      batch_size: images at once on the device.

    Raises:
      UserError: nothing is there, it cannot be read, `batch_size` is not positive, or
        the environment asks JAX for a platform that is not there.
    """
    check_platform()
    return Model(trained.load(path, best_by=best_by), batch_size)


class Model:
    """A classifier that is an energy-based model.

    Images are [N, H, W, C], float in [0, 1] or uint8; one image [H, W, C] is taken as
    N = 1. Labels are ints in 0..K-1, [N] or one number for all. Every method raises
    `UserError` for images of another size or range, labels that are no classes, and
    arguments outside of their range. Samples and edits do not depend on what is
    computed beside them, on `batch_size` or on the number of devices, bit for bit on
    one machine.

    Attributes:
      image_shape: (H, W, C).
      num_classes: K.
      class_names: K names; None where nobody gave them.
      config: the complete config of the training; not to be changed.
    """

    def __init__(self, loaded: trained.Trained, batch_size: int):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(
                f"batch_size is {batch_size!r}: it must be a positive whole number."
            )
        self.image_shape: tuple[int, int, int] = loaded.image_shape
        self.num_classes: int = loaded.num_classes
        self.class_names: tuple[str, ...] | None = loaded.class_names
        self.config: ConfigDict = loaded.config
        self._batch_size = batch_size
        self._gaussian = loaded.gaussian
        self._variables = jax.device_put(loaded.variables)
        self._model = loaded.model

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits f(x): [N, K] float32."""
        return self._run(_logits(self._model), self._images(images))

    def energy(self, images: np.ndarray, labels: Any = None) -> np.ndarray:
        """E(x), or E(x, y) where labels are given: [N] float32, lower is likelier."""
        logits = jnp.asarray(self.logits(images))
        if labels is None:
            return np.asarray(energy.marginal(logits))
        y = jnp.asarray(self._labels(labels, len(logits)))
        return np.asarray(energy.joint(logits, y))

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Class probabilities p(y | x): [N, K] float32; `argmax(-1)` is the class."""
        return np.asarray(energy.class_probabilities(jnp.asarray(self.logits(images))))

    def sample(
        self,
        labels: Any = None,
        *,
        count: int | None = None,
        seeds: np.ndarray | None = None,
        step_size: float | None = None,
        num_steps: int | None = None,
        seed: int = 0,
        sampler: str | None = None,
        schedule: str = "constant",
        target_energy: float | None = None,
        smooth: float = 0.0,
    ) -> np.ndarray:
        """Draws images by descent of the energy (paper, section 5).

        Args:
          labels: classes to draw, [N] or one for all; None draws from the marginal.
          count: how many, where neither labels nor seeds have a length; default 1.
          seeds: images to start from; default as in training where seeds were drawn,
            uniform noise where they were a data set.
          step_size, num_steps, sampler: as of `recipes.Recipe`, default the config's:
            "pgd" (the paper's), "momentum", "adam", "sgld(noise=0.005)" or "sign".
          seed, schedule, target_energy, smooth: as of `recipes.Recipe`.

        Returns:
          [N, H, W, C] float32 in [0, 1]; image i depends on its class, its seed and i.

        Raises:
          UserError: also where lengths differ.
        """
        number = self._count(labels, count, seeds)
        recipe = recipes.of_config(
            self.config.evaluate.samples,
            sampler=sampler,
            schedule=schedule,
            step_size=step_size,
            num_steps=num_steps,
            target_energy=target_energy,
            smooth=smooth,
            seed=seed,
            conditional=labels is not None,
        )
        last = number - 1  # fills up the last chunk
        classes = None if labels is None else self._labels(labels, number)

        def labels_of(indices: np.ndarray) -> np.ndarray:
            return indices if classes is None else classes[np.minimum(indices, last)]

        if seeds is None:
            spec = NOISE if self._gaussian is None else self.config.data.seeds
            seeds_of = seeds_fn(spec, seed, self.config.data, gaussian=self._gaussian)
        else:
            start = self._images(seeds)
            seeds_of = lambda indices, labels: start[np.minimum(indices, last)]
        return drawing.images(
            self._model, self._variables, recipe, number, labels_of, seeds_of
        )

    def counterfactual(
        self,
        images: np.ndarray,
        targets: Any,
        *,
        radius: Any = 4.0,
        norm: str = "l2",
        step_size: float | None = None,
        num_steps: int | None = None,
    ) -> Edited:
        """What images would look like as another class (paper, section 5).

        PGD on f(x)[target] in a ball around each image.

        Args:
          images: the originals.
          targets: the classes they shall become, [N] or one for all.
          radius: of the ball > 0, one for all or [N], pixels of the norm; 1 to 8 is
            usual for "l2", 1 the largest for "linf".
          norm: "l2" or "linf".
          step_size: > 0, pixels of the norm per step; default the config's for samples,
            or radius / 5 where that is less.
          num_steps: steps T, >= 0; default the config's for samples.

        Returns:
          `images` [N, H, W, C] float32 in [0, 1], in the ball, and the way there:
          `path.target_confidence`, `path.original_confidence`, `path.energy`,
          `path.predicted`, [N, T + 1] each; `originals` [N], the classes before.
        """
        x = self._images(images)
        return self.edit(
            constraints.ball(x, radius, norm),
            self._labels(targets, len(x)),
            step_size=step_size,
            num_steps=num_steps,
        )

    def edit(
        self,
        constraint: constraints.Constraint,
        labels: Any = None,
        *,
        step_size: float | None = None,
        num_steps: int | None = None,
        sampler: str | None = None,
        schedule: str = "constant",
        seed: int = 0,
    ) -> Edited:
        """Lowers the energy of images as far as a constraint allows.

            from atebm_jax import constraints

            model.edit(constraints.inpaint(images, mask), 3)
            model.edit(constraints.ball(images, radius=2.0), 3)
            model.edit(constraints.denoise(images, sigma=0.1), "guess")
            model.edit(constraints.superres(small_images, factor=2))

        Args:
          constraint: one of `atebm_jax.constraints`, or anything like them.
          labels: classes, [N] or one for all; "guess" for those that the model takes
            the starts for; None to lower E(x), whatever the class.
          step_size: as of `sample`; default in a ball radius / 5 where that is less.
          num_steps, schedule, seed: as of `sample`; images share the sampler's noise.
          sampler: as of `sample`; default in a ball "pgd", in one of the maximum norm
            "sign".

        Returns:
          As of `counterfactual`.
        """
        number = editing.check_constraint(constraint, self.image_shape)
        if not isinstance(labels, str):
            classes = None if labels is None else self._labels(labels, number)
        elif labels == "guess":
            classes = np.full(number, editing.GUESS, np.int32)
        else:
            raise UserError(f"labels are {labels!r}: expected ints, 'guess' or None.")
        rows, recipe = editing.prepare(
            constraint,
            classes,
            self.config.evaluate.samples,
            step_size=step_size,
            num_steps=num_steps,
            sampler=sampler,
            schedule=schedule,
            seed=seed,
        )
        return editing.edit(self._model, self._variables, rows, recipe)

    def attack(
        self,
        images: np.ndarray,
        labels: Any,
        *,
        norm: str | None = None,
        epsilon: float | None = None,
        step_size: float | None = None,
        num_steps: int | None = None,
        momentum: float | None = None,
        keep_best: bool | None = None,
    ) -> np.ndarray:
        """PGD on the cross-entropy: the adversary of evaluation and training.

        What is not given is the config's, `evaluate.attack`: this is the attack behind
        the robust accuracy of the job's report and of the evaluate command's `pgd`.

        Args:
          images: to be attacked.
          labels: their true classes.
          norm: "l2", "linf" or "unbounded"; another than the config's needs the two
            lengths below too.
          epsilon: radius in the norm's pixels of a [0, 1] image.
          step_size: > 0, pixels per step.
          num_steps: steps, >= 0.
          momentum: decay of the velocity, in [0, 1); 0 is plain PGD.
          keep_best: return of all iterates, the image among them, the one with the
            highest loss, instead of the last.

        Returns:
          [N, H, W, C] float32 in [0, 1], inside the ball.
        """
        settings = self.config.evaluate.attack
        x = self._images(images)
        given = {
            "norm": norm,
            "epsilon": epsilon,
            "step_size": step_size,
            "num_steps": num_steps,
            "momentum": momentum,
            "keep_best": keep_best,
        }
        given = {name: value for name, value in given.items() if value is not None}
        lengths = ["step_size"] if norm == "unbounded" else ["epsilon", "step_size"]
        missing = [name for name in lengths if name not in given]
        if norm not in (None, settings.norm) and norm in attacks.THREATS and missing:
            raise UserError(
                f"norm is {norm!r} and the defaults are for {settings.norm!r}: give "
                f"{' and '.join(missing)} too."
            )
        chosen = dict(settings) | given
        _check_attack(chosen)
        traced = {
            "epsilon": np.float32(chosen.pop("epsilon")),
            "step_size": np.float32(chosen.pop("step_size")),
            "num_steps": np.int32(chosen.pop("num_steps")),
        }
        attacker = partial(_attacker(self._model, **chosen), traced)
        return self._run(attacker, x, self._labels(labels, len(x)))

    def _run(self, function: Callable, *arrays: np.ndarray) -> np.ndarray:
        """Applies a compiled function in padded batches of one size."""
        outputs = []
        for start in range(0, len(arrays[0]), self._batch_size):
            parts = [array[start : start + self._batch_size] for array in arrays]
            missing = self._batch_size - len(parts[0])
            padded = [
                np.pad(p, [(0, missing)] + [(0, 0)] * (p.ndim - 1)) for p in parts
            ]
            output = function(self._variables, *padded)
            outputs.append(np.asarray(output)[: len(parts[0])])
        return np.concatenate(outputs)

    def _images(self, images: np.ndarray) -> np.ndarray:
        x = np.asarray(images)
        x = x[None] if x.ndim == 3 else x
        if x.ndim != 4 or x.shape[1:] != self.image_shape or not len(x):
            raise UserError(
                f"images have shape {np.shape(images)}: this model takes [N, H, W, C] "
                f"= [N, {', '.join(map(str, self.image_shape))}] with N >= 1."
            )
        return constraints.as_images(x)

    def _labels(self, labels: Any, number: int) -> np.ndarray:
        y = np.asarray(labels)
        y = np.full(number, y) if y.ndim == 0 else y
        if y.shape != (number,) or not np.issubdtype(y.dtype, np.integer):
            raise UserError(
                f"labels have shape {y.shape} and dtype {y.dtype}: expected one int "
                f"for each of {number} images."
            )
        if y.min() < 0 or y.max() >= self.num_classes:
            raise UserError(
                f"labels run from {y.min()} to {y.max()}: expected 0 to "
                f"{self.num_classes - 1}."
            )
        return y.astype(np.int32)

    def _count(self, labels: Any, count: int | None, seeds: Any) -> int:
        lengths = {
            "labels": np.size(labels) if np.ndim(labels) == 1 else None,
            "seeds": len(self._images(seeds)) if seeds is not None else None,
            "count": count,
        }
        given = {name: n for name, n in lengths.items() if n is not None}
        if not isinstance(given.get("count", 1), int | np.integer):
            raise UserError(f"count is {count!r}: it must be a whole number.")
        # Images are numbered in 32 bits.
        if given.get("count", 1) >= 2**31 - drawing.CHUNK:
            raise UserError(f"count is {count}: it must be below 2**31 - 32.")
        if len(set(given.values())) > 1 or min(given.values(), default=1) < 1:
            described = ", ".join(f"{name} {n}" for name, n in given.items())
            raise UserError(
                f"how many images to sample is not clear: {described}; they must be "
                "positive and the same."
            )
        return next(iter(given.values()), 1)


def _check_attack(chosen: dict[str, Any]) -> None:
    """Refuses what nothing can be attacked with."""
    number = int | float | np.number
    if not isinstance(chosen["epsilon"], number):
        raise UserError(
            f"epsilon is {chosen['epsilon']!r}: it must be a number, a radius."
        )
    attacks.threat(chosen["norm"], float(chosen["epsilon"]))
    decay = chosen["momentum"]
    if not isinstance(decay, number) or not 0 <= decay < 1:
        raise UserError(
            f"momentum is {decay!r}: it must be a number in [0, 1), 0 for plain PGD."
        )
    if not isinstance(chosen["keep_best"], bool | np.bool_):
        raise UserError(
            f"keep_best is {chosen['keep_best']!r}: it must be True or False."
        )
    recipes.check(
        recipes.Recipe(step_size=chosen["step_size"], num_steps=chosen["num_steps"])
    )


@lru_cache
def _logits(model: nn.Module) -> Callable:
    return jax.jit(lambda variables, x: models.logits_fn(model, variables)(x))


@lru_cache
def _attacker(model: nn.Module, **settings: Any) -> Callable:
    # Radius and steps are arguments below: others do not recompile.
    adversary = attacks.adversary(**settings, epsilon=1.0, step_size=1.0, num_steps=0)

    def attack(
        traced: dict[str, jax.Array], variables: Any, x: jax.Array, y: jax.Array
    ) -> jax.Array:
        return adversary(models.freeze(model, variables, x.shape[1:]), x, y, **traced)

    return jax.jit(attack)
