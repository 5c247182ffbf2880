"""Counterfactuals: a nearby image that the model calls another class (section 5)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from atebm_jax import attacks, energy, metrics, sampling
from atebm_jax.errors import UserError
from atebm_jax.evaluate import extractors, figures
from atebm_jax.evaluate.context import Context, Network, RowsFn, figure
from atebm_jax.evaluate.extractors import Extractor

# Classes with fewer counterfactuals or real images have no Frechet distance.
_SMALLEST_CLASS = 10
_STRIPS = 12


def targets_of(
    logits: jax.Array, labels: jax.Array, target: str, num_classes: int
) -> jax.Array:
    """The class each image shall become.

    Args:
      logits: [B, K].
      labels: [B] int.
      target: "next" (y + 1 modulo K), "runner_up" (the likeliest class besides y) or
        a class number, given to every image.
      num_classes: K.

    Raises:
      UserError: any other target.
    """
    if target == "next":
        return (labels + 1) % num_classes
    if target == "runner_up":
        others = jnp.arange(num_classes)[None, :] != labels[:, None]
        return jnp.where(others, logits, -jnp.inf).argmax(axis=-1).astype(labels.dtype)
    if not target.isdecimal() or int(target) >= num_classes:
        raise UserError(
            f"--target is {target!r}: choose next, runner_up or a class from 0 to "
            f"{num_classes - 1}."
        )
    return jnp.full_like(labels, int(target))


def run(context: Context, out: epath.Path) -> dict[str, Any]:
    """Validity, distance and realism of counterfactuals at every radius."""
    settings = context.config.evaluate.samples
    extractor = extractors.of(context)
    real = context.map_images(
        "features of test",
        "test",
        _features(extractor),
        extractor.variables,
        extractor=extractor.fingerprint,
    )
    values: dict[str, Any] = {}
    strips, rows = {}, {}
    for radius in context.options.radii:
        step_size = float(sampling.counterfactual_step_size(settings.step_size, radius))
        rows = context.map_images(
            f"counterfactuals {radius:g}",
            "test",
            _explain(context, extractor, radius, step_size),
            extractor.variables,
            extractor=extractor.fingerprint,
            radius=radius,
            step_size=step_size,
            num_steps=settings.num_steps,
            target=context.options.target,
        )
        strips[radius] = rows["images"][:_STRIPS]
        values |= _figures(context, extractor, radius, rows, real)
    originals = context.map_images(
        "originals", "test", lambda network, x, y: {"images": x}
    )
    number = context.config.model.num_classes
    names = context.sources["test"].class_names or [str(k) for k in range(number)]
    figures.strips(
        out / "counterfactuals.png",
        {"original": originals["images"][:_STRIPS]}
        | {f"radius {radius:g}": images for radius, images in strips.items()},
        [
            f"{names[a]} to {names[b]}"
            for a, b in zip(rows["labels"][:_STRIPS], rows["targets"][:_STRIPS])
        ],
    )
    protocol = {
        "target": context.options.target,
        "norm": "l2",
        "num_steps": settings.num_steps,
        "step_size": f"the smaller of {settings.step_size:g} and radius / 5",
        "frechet_distance": f"per class in the features of {extractor.name}, mean "
        f"over classes with {_SMALLEST_CLASS} images or more on both sides",
        "interval": f"normal, error of {context.options.num_resamples} bootstraps",
    }
    return {"protocol": protocol, "figures": values}


def _features(extractor: Extractor) -> RowsFn:
    def extract(
        network: Network, x: jax.Array, y: jax.Array, variables: Any
    ) -> dict[str, jax.Array]:
        del network, y
        return {"features": extractor.apply(variables, x)[0]}

    return extract


def _explain(
    context: Context, extractor: Extractor, radius: float, step_size: float
) -> RowsFn:
    num_steps = context.config.evaluate.samples.num_steps
    num_classes = context.config.model.num_classes

    def explain(
        network: Network, x: jax.Array, y: jax.Array, variables: Any
    ) -> dict[str, jax.Array]:
        targets = targets_of(network.logits(x), y, context.options.target, num_classes)
        result = sampling.counterfactual(
            network.logits,
            x,
            targets,
            threat=attacks.l2(radius),
            step_size=step_size,
            num_steps=num_steps,
        )
        rows = {
            "images": result,
            "targets": targets,
            "confidence": _confidence(network.logits(result), targets),
            "distance": attacks.l2_norm(result - x)[:, 0, 0, 0],
            "features": extractor.apply(variables, result)[0],
        }
        if context.judge is not None:
            rows["judge_confidence"] = _confidence(context.judge(result), targets)
        return rows

    return explain


def _confidence(logits: jax.Array, targets: jax.Array) -> jax.Array:
    probabilities = energy.class_probabilities(logits)
    return jnp.take_along_axis(probabilities, targets[:, None], axis=-1)[:, 0]


def _figures(
    context: Context,
    extractor: Extractor,
    radius: float,
    rows: dict[str, np.ndarray],
    real: dict[str, np.ndarray],
) -> dict[str, Any]:
    # An image that is of its target class already explains nothing.
    asked = rows["targets"] != rows["labels"]
    names = {
        "target_confidence": "confidence",
        "judge_target_confidence": "judge_confidence",
        "l2_distance": "distance",
    }
    values = {}
    for name, key in names.items():
        if key in rows and asked.any():
            values[f"radius_{radius:g}/{name}"] = _mean(context, rows[key][asked])
    distances = []
    for label in range(context.config.model.num_classes):
        sets = [
            rows["features"][asked & (rows["targets"] == label)],
            real["features"][real["labels"] == label],
        ]
        if min(map(len, sets)) >= _SMALLEST_CLASS:
            a, b = (metrics.feature_statistics(features) for features in sets)
            distances.append(metrics.frechet_distance(*a, *b))
    if distances:
        name = f"frechet_distance_{extractor.name}_features"
        values[f"radius_{radius:g}/{name}"] = figure(
            float(np.mean(distances)), None, len(distances)
        )
    return values


def _mean(context: Context, values: np.ndarray) -> dict[str, Any]:
    interval = metrics.bootstrap_interval(
        lambda a: float(a.mean()),
        [values],
        paired=False,
        num_resamples=context.options.num_resamples,
        seed=context.options.seed,
    )
    return figure(float(values.mean()), interval, len(values))
