"""Counterfactuals: a nearby image that the model calls another class (section 5)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from etils import epath

from atebm_jax import attacks, editing, energy, metrics, pictures, recipes
from atebm_jax.data import classes
from atebm_jax.errors import UserError
from atebm_jax.evaluate import extractors
from atebm_jax.evaluate.context import Context, RowsFn, check_finite, figure, share_of
from atebm_jax.evaluate.extractors import Extractor
from atebm_jax.evaluate.store import Arrays
from atebm_jax.models import LogitsFn

# Classes with fewer counterfactuals or real images have no Frechet distance.
_SMALLEST_CLASS = 10
_STRIPS = 12

# Names in the report, and the arrays they are made of.
_MEANS = {
    "target_confidence": "confidence",
    "judge_target_confidence": "judge_confidence",
    "l2_distance": "l2",
    "l1_distance": "l1",
}
_SHARES = {
    "classified_as_target": "agrees",
    "judge_classifies_as_target": "judge_agrees",
}


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
    """
    if target == "next":
        return (labels + 1) % num_classes
    if target == "runner_up":
        others = jnp.arange(num_classes)[None, :] != labels[:, None]
        return jnp.where(others, logits, -jnp.inf).argmax(axis=-1).astype(labels.dtype)
    return jnp.full_like(labels, int(target))


def _target(context: Context) -> str:
    """As `targets_of` takes it: the option, or the place of the class that it names."""
    target, number = context.options.target, context.config.model.num_classes
    names = classes.names_of(context.sources["test"].class_names, number)
    if target in ("next", "runner_up"):
        classes.check_keyword("--target", target, names)
        return target
    return str(classes.find("--target", target, names, ", or next or runner_up"))


def check(context: Context) -> None:
    """Refuses no radii, no target and features that are not there: a `UserError`."""
    if not context.options.radii:
        raise UserError("--radii is empty: give positive numbers, such as 1,2,4.")
    _target(context)
    extractors.of(context)


def run(context: Context, out: epath.Path) -> dict[str, Any]:
    """Validity, distance and realism of counterfactuals at every radius."""
    settings, target = context.config.evaluate.samples, _target(context)
    longest = recipes.step_length(settings.sampler, settings.step_size)
    extractor = extractors.of(context)
    real = context.map_images(
        "features of test",
        "test",
        extractor.features,
        extractor.variables,
        extractor=extractor.fingerprint,
    )
    values: dict[str, Any] = {}
    per_class: dict[str, dict[str, Any]] = {}
    found: dict[float, Arrays] = {}
    for radius in context.options.radii:
        step_size = float(editing.counterfactual_step_size(longest, radius))
        rows = found[radius] = context.map_images(
            f"counterfactuals {radius:g}",
            "test",
            _explain(context, extractor, target, radius, step_size),
            extractor.variables,
            context.judge.variables if context.judge else None,
            only_first={"images": _STRIPS, "originals": _STRIPS},
            extractor=extractor.fingerprint,
            radius=radius,
            step_size=step_size,
            num_steps=settings.num_steps,
            target=target,
        )
        check_finite("features", real["features"], rows["features"])
        figures = _figures(context, rows)
        if distances := _distances(context, rows, real):
            name = f"frechet_distance_{extractor.name}_features"
            figures[name] = _mean_of_classes([d["value"] for d in distances.values()])
            per_class[f"radius_{radius:g}"] = distances
        values |= {f"radius_{radius:g}/{name}": f for name, f in figures.items()}
    _draw(context, out, found)
    protocol = {
        "target": target,
        "judge": context.judge.fingerprint if context.judge else "none",
        "norm": "l2",
        "num_steps": settings.num_steps,
        "step_size": f"the smaller of {longest:g} and radius / 5",
        "count": "images that are not asked to become their own class",
        "extractor": extractor.description,
        "frechet_distance": f"between a class's counterfactuals and test images in the "
        f"features of {extractor.name}, for classes with {_SMALLEST_CLASS} or more of "
        "both, and the mean over these classes; it grows as images become fewer",
        "interval": "confidence and distances: normal, error of "
        f"{context.options.num_resamples} bootstraps; shares: Wilson; mean Frechet "
        "distance: Student's t over classes",
    }
    return {
        "protocol": protocol,
        "figures": values,
        "per_class": per_class,
        "plots": ["counterfactuals.png"],
    }


def _draw(context: Context, out: epath.Path, found: dict[float, Arrays]) -> None:
    """Originals and counterfactuals below each other, the class change above."""
    number = context.config.model.num_classes
    names = classes.names_of(context.sources["test"].class_names, number)
    first = next(iter(found.values()))
    rows = {f"radius {radius:g}": images["images"] for radius, images in found.items()}
    changes = zip(first["labels"][:_STRIPS], first["targets"][:_STRIPS])
    pictures.image_rows(
        out / "counterfactuals.png",
        {"original": first["originals"]} | rows,
        [f"{names[a]} to {names[b]}" for a, b in changes],
    )


def _explain(
    context: Context, extractor: Extractor, target: str, radius: float, step_size: float
) -> RowsFn:
    config = context.config

    def explain(
        logits_fn: LogitsFn, x: jax.Array, y: jax.Array, variables: Any, judge: Any
    ) -> dict[str, jax.Array]:
        targets = targets_of(logits_fn(x), y, target, config.model.num_classes)
        result = attacks.attack(
            lambda images: energy.score(logits_fn(images), targets),
            x,
            attacks.l2(radius),
            step_size=step_size,
            num_steps=config.evaluate.samples.num_steps,
        )
        change = (result - x).reshape(x.shape[0], -1)
        rows = {
            "images": result,
            "originals": x,
            "targets": targets,
            "l2": jnp.linalg.norm(change, axis=-1),
            "l1": jnp.abs(change).sum(axis=-1),
            "features": extractor.apply(variables, result)[0],
        }
        said = {"": logits_fn(result)}
        if context.judge is not None:
            said["judge_"] = context.judge.logits(judge, result)
        for prefix, logits in said.items():
            probabilities = energy.class_probabilities(logits)
            rows[f"{prefix}confidence"] = energy.at_labels(probabilities, targets)
            rows[f"{prefix}agrees"] = metrics.accuracy(logits, targets)
        return rows

    return explain


def _figures(context: Context, rows: Arrays) -> dict[str, Any]:
    """Means and shares; an image of its target class already explains nothing."""
    asked = rows["targets"] != rows["labels"]
    if not asked.any():
        return {}
    figures = {}
    for name, key in _MEANS.items():
        if key in rows:
            values = rows[key][asked]
            interval = metrics.bootstrap_interval(
                np.mean, [values], paired=False, **context.options.resampling
            )
            figures[name] = figure(values.mean(), interval, len(values))
    for name, key in _SHARES.items():
        if key in rows:
            figures[name] = share_of(rows[key][asked])
    return figures


def _distances(context: Context, rows: Arrays, real: Arrays) -> dict[str, Any]:
    """Frechet distance of each class that has enough images, by its number."""
    asked = rows["targets"] != rows["labels"]
    distances = {}
    for label in range(context.config.model.num_classes):
        sets = [
            rows["features"][asked & (rows["targets"] == label)],
            real["features"][real["labels"] == label],
        ]
        if min(map(len, sets)) >= _SMALLEST_CLASS:
            a, b = (metrics.feature_statistics(features) for features in sets)
            distance = metrics.frechet_distance(*a, *b)
            distances[str(label)] = figure(distance, None, len(sets[0]))
    return distances


def _mean_of_classes(distances: list[float]) -> dict[str, Any]:
    mean, number = float(np.mean(distances)), len(distances)
    if number < 2:
        return figure(mean, None, number)
    reach = scipy.stats.t.ppf(0.975, number - 1) * scipy.stats.sem(distances)
    return figure(mean, (max(mean - reach, 0.0), mean + reach), number)
