"""Scores of samples: Frechet distance, Inception Score, KID, precision and recall."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from atebm_jax import ascent, metrics, pictures, recipes
from atebm_jax.errors import UserError
from atebm_jax.evaluate import extractors, feature_units, references
from atebm_jax.evaluate.context import Context, check_finite, figure
from atebm_jax.evaluate.extractors import Extractor
from atebm_jax.evaluate.references import Reference
from atebm_jax.metrics import Moments, SplitSums

_SPLITS = 10
_GROUPS = 10
_SMALLEST = 2 * _SPLITS
# Of each sample some numbers stay in memory, of each number of steps a covariance.
_MOST_SAMPLES, _WIDEST_SWEEP = 10**7, 100
_KERNEL_BLOCK = 1000


@dataclasses.dataclass
class Seen:
    """What is kept of the samples, whose number it does not grow with.

    Attributes:
      groups: moments of consecutive tenths of the samples.
      splits: sums for the Inception Score.
      features: [M, D] of the first samples.
      shown: [S, H, W, C] uint8 of the first samples.
      agreeing: samples that the extractor's network calls by the class asked for.
      stand_ins: samples that began at the next seed, as theirs cannot be decoded.
    """

    groups: list[Moments]
    splits: SplitSums
    features: np.ndarray
    shown: np.ndarray
    agreeing: int = 0
    stand_ins: int = 0


def run(context: Context, out: epath.Path) -> dict[str, Any]:
    """Scores class-balanced samples against real images (method: sections 5 and 6).

    Without Inception's weights another network's features stand in, and every score is
    named by it: only those of Inception are called FID and KID.

    Raises:
      UserError: as of `check`; features or statistics that are no numbers.
    """
    extractor = extractors.of(context)
    reference = references.load(context, extractor, _dimensions(context, extractor))
    names = _names(extractor)
    base = context.config.evaluate.samples.num_steps
    curve = _sweep(context, extractor, reference)
    num_steps = min(curve, key=lambda steps: curve[steps]) if curve else base
    seen = _collect(context, extractor, num_steps)
    values = _frechet(seen, reference, names) | _inception_score(context, seen, names)
    if seen.splits.probabilities.shape[1] == context.config.model.num_classes:
        values |= _agreement(seen, extractor.name)
    if reference.features is not None:
        values |= _pairs(seen.features, reference.features, names)
    if jax.process_index() == 0:
        _write(context, out, seen, reference, curve, names, num_steps)
    protocol = _protocol(context, extractor, reference, curve, num_steps)
    protocol["undecodable_seeds"] = seen.stand_ins
    if seen.stand_ins:
        protocol["notes"].append(
            f"{seen.stand_ins} samples began at the next image of the seeds, as theirs "
            "cannot be decoded"
        )
    names_of_plots = ["sampling_steps.png"] * bool(curve) + ["samples.png"]
    return {"protocol": protocol, "figures": values, "plots": names_of_plots}


def check(context: Context) -> None:
    """Refuses what could not be scored, before anything is drawn.

    Raises:
      UserError: too few samples or real images, an unknown choice, a file that is not
        there, or a cache that cannot be written.
    """
    options = context.options
    recipes.check_sampler(context.config.evaluate.samples.sampler)
    if not _SMALLEST <= options.num_samples <= _MOST_SAMPLES:
        raise UserError(
            f"--num_samples is {options.num_samples}: the scores of samples need "
            f"{_SMALLEST} or more, and {_MOST_SAMPLES} are the most."
        )
    if options.sweep > _WIDEST_SWEEP:
        raise UserError(
            f"--sweep is {options.sweep}: at most {_WIDEST_SWEEP} numbers of steps are "
            "tried to either side."
        )
    if options.sweep and options.sweep_samples < _SMALLEST:
        raise UserError(
            f"--sweep_samples is {options.sweep_samples}: their distances need "
            f"{_SMALLEST} or more, or give --sweep=0."
        )
    if not 2 * _GROUPS <= options.num_pairs:
        raise UserError(
            f"--num_pairs is {options.num_pairs}: give {2 * _GROUPS} or more."
        )
    choices = {
        "quantise": (options.quantise, tuple(recipes.QUANTISE)),
        "score_protocol": (options.score_protocol, metrics.SCORE_PROTOCOLS),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise UserError(
                f"--{name} is {value!r}: choose one of {', '.join(allowed)}."
            )
    extractor = extractors.of(context)
    references.check(context, extractor, _dimensions(context, extractor))


def _names(extractor: Extractor) -> dict[str, str]:
    """What the scores are called: by their usual names only with Inception."""
    if extractor.name == "inception":
        return {
            "frechet": "fid",
            "kernel": "kid",
            "score": "inception_score",
            "precision": "precision",
            "recall": "recall",
        }
    return {
        "frechet": f"frechet_distance_{extractor.name}_features",
        "kernel": f"kernel_distance_{extractor.name}_features",
        "score": f"inception_score_{extractor.name}_classes",
        "precision": f"precision_{extractor.name}_features",
        "recall": f"recall_{extractor.name}_features",
    }


def _dimensions(context: Context, extractor: Extractor) -> int:
    images = jax.ShapeDtypeStruct((1, *context.image_shape), jnp.float32)
    features, _ = jax.eval_shape(extractor.apply, extractor.variables, images)
    return features.shape[1]


def _sweep(
    context: Context, extractor: Extractor, reference: Reference
) -> dict[int, float]:
    """Frechet distance of few samples for the numbers of steps around the config's."""
    base, reach = context.config.evaluate.samples.num_steps, context.options.sweep
    if reach == 0:
        return {}
    steps = range(max(base - reach, 0), base + reach + 1)
    count = min(context.options.sweep_samples, context.options.num_samples)
    plan = feature_units.Plan("sweep of sampling steps", count, steps)
    moments = [Moments.empty(len(reference.mean)) for _ in steps]
    for unit in feature_units.draw(context, extractor, plan):
        for position in range(len(steps)):
            more = Moments.of(unit["features"][:, position])
            moments[position] = moments[position].merge(more)
    return {
        number: _distance(part, reference)
        for number, part in zip(steps, moments, strict=True)
    }


def _collect(context: Context, extractor: Extractor, num_steps: int) -> Seen:
    options, settings = context.options, context.config.evaluate.samples
    count, protocol = options.num_samples, options.score_protocol
    plan = feature_units.Plan(
        f"samples, {num_steps} steps",
        count,
        range(num_steps, num_steps + 1),
        protocol,
        settings.grid_rows * min(context.config.model.num_classes, 20),
    )
    # Labels are cyclic: the splits of the score are of shuffled images.
    order = np.random.default_rng(options.seed).permutation(count)
    split_of = np.empty(count, int)
    split_of[order] = metrics.split_of_images(count, _SPLITS, protocol)
    group_of = np.arange(count) * _GROUPS // count
    seen: Seen | None = None
    first, kept, shown = 0, [], []
    for unit in feature_units.draw(context, extractor, plan):
        features, logits = unit["features"][:, 0], unit["logits"]
        check_finite("features and logits of samples", features, logits)
        if seen is None:
            groups = [Moments.empty(features.shape[1]) for _ in range(_GROUPS)]
            splits = SplitSums.empty(split_of.max() + 1, logits.shape[1])
            seen = Seen(groups, splits, np.empty(0), np.empty(0))
        here = slice(first, first + len(features))
        for group in np.unique(group_of[here]):
            more = Moments.of(features[group_of[here] == group])
            seen.groups[group] = seen.groups[group].merge(more)
        seen.splits = seen.splits.add(logits, split_of[here])
        asked_for = np.arange(here.start, here.stop) % context.config.model.num_classes
        seen.agreeing += int((logits.argmax(-1) == asked_for).sum())
        kept.append(features[: max(options.num_pairs - first, 0)])
        shown.append(unit["bytes"])
        seen.stand_ins += int(unit["stand_in"].sum())
        first = here.stop
    assert seen is not None
    seen.features, seen.shown = np.concatenate(kept), np.concatenate(shown)
    return seen


def _merged(groups: list[Moments]) -> Moments:
    total = groups[0]
    for group in groups[1:]:
        total = total.merge(group)
    return total


def _distance(moments: Moments, reference: Reference) -> float:
    mean, covariance = moments.statistics()
    check_finite("features of samples", covariance)
    return metrics.frechet_distance(
        mean, covariance, reference.mean, reference.covariance
    )


def _frechet(
    seen: Seen, reference: Reference, names: Mapping[str, str]
) -> dict[str, Any]:
    total = _merged(seen.groups)
    value = _distance(total, reference)
    without = [
        _distance(_merged(seen.groups[:g] + seen.groups[g + 1 :]), reference)
        for g in range(_GROUPS)
    ]
    interval = metrics.jackknife_interval(value, without)
    return {names["frechet"]: figure(value, interval, total.number)}


def _inception_score(
    context: Context, seen: Seen, names: Mapping[str, str]
) -> dict[str, Any]:
    scores = seen.splits.scores()
    mean = float(scores.mean())
    spread = metrics.score_spread(scores, context.options.score_protocol)
    reach = 1.96 * spread / np.sqrt(len(scores))
    number = int(seen.splits.counts.sum())
    return {
        names["score"]: figure(mean, (mean - reach, mean + reach), number),
        f"{names['score']}_spread": figure(spread, None, len(scores)),
    }


def _agreement(seen: Seen, name: str) -> dict[str, Any]:
    """Share of samples that a classifier of the same classes calls as asked for."""
    number = int(seen.splits.counts.sum())
    interval = metrics.wilson_interval(seen.agreeing, number)
    return {
        f"agreement_{name}_classes": figure(seen.agreeing / number, interval, number)
    }


def _pairs(
    fake: np.ndarray, real: np.ndarray, names: Mapping[str, str]
) -> dict[str, Any]:
    """Scores that compare pairs of images, on a limited number of them."""
    size = min(_KERNEL_BLOCK, len(fake) // _GROUPS, len(real) // _GROUPS)
    blocks = [
        # Every tenth image, so that all classes are in each block.
        metrics.kernel_distance(
            real[g::_GROUPS][:size], fake[g * size : (g + 1) * size]
        )
        for g in range(_GROUPS)
    ]
    mean = float(np.mean(blocks))
    reach = 1.96 * float(np.std(blocks, ddof=1)) / np.sqrt(_GROUPS)
    count = min(len(fake), len(real))
    precision, recall = metrics.precision_recall(real[:count], fake[:count])
    shares = {
        names[name]: figure(
            share, metrics.wilson_interval(round(share * count), count), count
        )
        for name, share in (("precision", precision), ("recall", recall))
    }
    kernel = figure(mean, (mean - reach, mean + reach), size * _GROUPS)
    return {names["kernel"]: kernel} | shares


def _write(
    context: Context,
    out: epath.Path,
    seen: Seen,
    reference: Reference,
    curve: Mapping[int, float],
    names: Mapping[str, str],
    num_steps: int,
) -> None:
    references.write(
        out / "reference_statistics.npz", reference.mean, reference.covariance
    )
    statistics = _merged(seen.groups).statistics()
    references.write(out / "sample_statistics.npz", *statistics)
    if curve:
        named = ("sampling steps", names["frechet"])
        pictures.curve(out / "sampling_steps.png", curve, named)
    num_classes = context.config.model.num_classes
    pictures.sample_grid(
        out / "samples.png",
        {
            f"samples, {num_steps} steps": (
                seen.shown.astype(np.float32) / np.float32(255),
                np.arange(len(seen.shown)) % num_classes,
            )
        },
        num_classes=num_classes,
        num_rows=context.config.evaluate.samples.grid_rows,
        class_names=context.sources["test"].class_names,
    )


def _protocol(
    context: Context,
    extractor: Extractor,
    reference: Reference,
    curve: Mapping[int, float],
    num_steps: int,
) -> dict[str, Any]:
    options, config = context.options, context.config
    notes = []
    if options.num_samples <= len(reference.mean):
        notes.append(
            "fewer samples than features: their covariance is singular, and the "
            "Frechet distance is biased upwards"
        )
    if options.num_samples % config.model.num_classes:
        notes.append("the number of samples is no multiple of the number of classes")
    if num_steps in (min(curve, default=None), max(curve, default=None)) and curve:
        notes.append(
            "the best number of steps lies at the edge of the sweep: a wider one "
            "(--sweep) or another config.evaluate.samples.num_steps may find a better"
        )
    if reference.features is None:
        notes.append(
            "no kernel distance, precision, recall: only statistics were given"
        )
    return {
        "extractor": extractor.description,
        "reference": reference.description,
        "samples": options.num_samples,
        "labels": "0 to K-1 cyclically",
        "seeds": config.data.seeds,
        "sampler": ascent.resolved(config.evaluate.samples.sampler),
        "step_size": config.evaluate.samples.step_size,
        "num_steps": num_steps,
        "sweep": {str(k): round(v, 4) for k, v in curve.items()},
        "sweep_samples": min(options.sweep_samples, options.num_samples),
        "quantise": options.quantise,
        "inception_score": f"{options.score_protocol} protocol, {_SPLITS} splits, "
        f"images shuffled with seed {options.seed}",
        "kernel_distance": f"{_GROUPS} blocks of at most {_KERNEL_BLOCK}",
        "precision_recall": f"k = 3, at most {options.num_pairs} images of each side",
        "interval": f"Frechet: jackknife over {_GROUPS} groups; Inception Score and "
        "kernel distance: normal, from splits and blocks; precision and recall: "
        "Wilson, for the manifold as it is",
        "notes": notes,
    }
