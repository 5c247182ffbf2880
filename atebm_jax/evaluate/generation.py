"""Scores of samples: Frechet distance, Inception Score, KID, precision and recall."""

import dataclasses
import logging
from collections.abc import Mapping
from functools import reduce
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from atebm_jax import data, metrics, pictures, recipes, seeds, storage
from atebm_jax.errors import UserError, check_choice
from atebm_jax.evaluate import extractors, feature_units, references
from atebm_jax.evaluate.context import Context, Options, check_finite, figure, share
from atebm_jax.evaluate.extractors import Extractor
from atebm_jax.evaluate.references import Reference
from atebm_jax.metrics import Moments, SplitSums
from atebm_jax.trained import Trained

_log = logging.getLogger(__name__)

_SPLITS = 10
_GROUPS = 10
_SMALLEST = 2 * _SPLITS
# Memory holds a few numbers for each sample, a covariance for each number of steps.
_MOST_SAMPLES, _WIDEST_SWEEP = 10**7, 100
_KERNEL_BLOCK = 1000

# What scores are called: with Inception, and with the features of another network.
_NAMES = {
    "frechet": ("fid", "frechet_distance_{}_features"),
    "kernel": ("kid", "kernel_distance_{}_features"),
    "score": ("inception_score", "inception_score_{}_classes"),
    "spread": ("inception_score_spread", "inception_score_{}_classes_spread"),
    "agreement": ("agreement_inception_classes", "agreement_{}_classes"),
    "precision": ("precision", "precision_{}_features"),
    "recall": ("recall", "recall_{}_features"),
}


@dataclasses.dataclass
class Seen:
    """What is kept of the samples, whatever their number."""

    num_steps: int  #: of sampling
    groups: list[Moments]  #: of consecutive tenths of the samples
    splits: SplitSums  #: for the Inception Score
    features: list[np.ndarray]  #: [B, D] of the first samples
    shown: list[np.ndarray]  #: [B, H, W, C] uint8 of the first samples
    agreeing: int = 0  #: samples that the extractor calls by the class asked for
    stand_ins: int = 0  #: samples that began at the next seed, as theirs is damaged


def run(context: Context, out: epath.Path) -> dict[str, Any]:
    """Scores class-balanced samples against real images (method: sections 5 and 6).

    Without Inception's weights another network's features stand in. Every score is then
    named by that network: only those of Inception are called FID and KID.

    Raises:
      UserError: as of `check`; features or statistics that are no numbers.
    """
    extractor = extractors.of(context)
    reference = references.load(context, extractor)
    curve = _sweep(context, extractor, reference)
    base = context.config.evaluate.samples.num_steps
    num_steps = min(curve, key=curve.__getitem__) if curve else base
    seen = _collect(context, extractor, num_steps)
    values = {"frechet": _frechet(seen, reference)} | _inception_score(context, seen)
    if _outputs(context, extractor) is not None:
        values["agreement"] = share(seen.agreeing, context.options.num_samples)
    if reference.features is not None:
        values |= _pairs(np.concatenate(seen.features), reference.features)
    plots = ["samples.png"]
    if curve:
        plots = ["sampling_steps.png", *plots]
        named = ("sampling steps", _name("frechet", extractor))
        pictures.curve(out / "sampling_steps.png", curve, named)
    if jax.process_index() == 0:
        _write(context, out, seen, reference)
    return {
        "protocol": _protocol(context, extractor, reference, curve, seen),
        "figures": {_name(key, extractor): value for key, value in values.items()},
        "plots": plots,
    }


def check(context: Context) -> None:
    """Refuses with a `UserError` what cannot be scored, before anything is drawn."""
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
    if options.num_pairs < 2 * _GROUPS:
        raise UserError(
            f"--num_pairs is {options.num_pairs}: give {2 * _GROUPS} or more."
        )
    check_choice("--quantise", options.quantise, recipes.QUANTISE)
    check_choice("--score_protocol", options.score_protocol, metrics.SCORE_PROTOCOLS)
    references.check(context, extractors.of(context))


def sources(settings: ml_collections.ConfigDict, options: Options) -> dict[str, str]:
    """The training images, and the seeds where they are read."""
    roles = ["train"] if settings.seeds in seeds.DRAWN else ["train", "seeds"]
    return {role: settings[role] for role in roles}


def prepare(context: Context, loaded: Trained, out: epath.Path) -> Context:
    """With the Gaussians that seeds are drawn from: the checkpoint's own, or fitted."""
    settings = context.config.data
    if settings.seeds not in seeds.FITTED:
        return context
    gaussian = loaded.gaussian
    if gaussian is None or loaded.config.data.seeds != settings.seeds:
        # The Gaussian of a class must be that of the network's class.
        what = f"config.data.train={settings.train}"
        train = data.relabel.follow(
            context.sources["train"], context.class_names, what, note=_log.warning
        )
        # A fit of an earlier evaluation is not reused: the store keeps both apart.
        keep = seeds.fit_if_absent(
            settings.seeds, train, settings, out / seeds.FILE, anew=True
        )
        gaussian = keep()
    store = context.store.within(gaussian=gaussian.fingerprint())
    return dataclasses.replace(context, gaussian=gaussian, store=store)


def _name(score: str, extractor: Extractor) -> str:
    usual, other = _NAMES[score]
    return usual if extractor.name == "inception" else other.format(extractor.name)


def _outputs(context: Context, extractor: Extractor) -> np.ndarray | None:
    """The extractor's output for each class of the model, if it has all of them."""
    outputs = extractor.outputs
    known = outputs is not None and len(outputs) == context.config.model.num_classes
    return outputs if known else None


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
    options, num_classes = context.options, context.config.model.num_classes
    count, protocol = options.num_samples, options.score_protocol
    name, ends = f"samples, {num_steps} steps", range(num_steps, num_steps + 1)
    num_shown = context.config.evaluate.samples.grid_rows * min(num_classes, 20)
    plan = feature_units.Plan(name, count, ends, protocol, num_shown)
    # Labels are cyclic: the splits of the score are of shuffled images.
    order = np.random.default_rng(options.seed).permutation(count)
    split_of = np.empty(count, int)
    split_of[order] = metrics.split_of_images(count, _SPLITS, protocol)
    group_of = np.arange(count) * _GROUPS // count
    num_features, num_logits = extractor.sizes(context.image_shape)
    outputs = _outputs(context, extractor)
    groups = [Moments.empty(num_features) for _ in range(_GROUPS)]
    splits = SplitSums.empty(split_of.max() + 1, num_logits)
    seen, first = Seen(num_steps, groups, splits, [], []), 0
    for unit in feature_units.draw(context, extractor, plan):
        features, logits = unit["features"][:, 0], unit["logits"]
        check_finite("features and logits of samples", features, logits)
        here = slice(first, first + len(features))
        for group in np.unique(group_of[here]):
            more = Moments.of(features[group_of[here] == group])
            seen.groups[group] = seen.groups[group].merge(more)
        seen.splits = seen.splits.add(logits, split_of[here])
        if outputs is not None:
            asked_for = outputs[np.arange(here.start, here.stop) % num_classes]
            seen.agreeing += int((logits.argmax(-1) == asked_for).sum())
        seen.features.append(features[: max(options.num_pairs - first, 0)])
        seen.shown.append(unit["bytes"])
        seen.stand_ins += int(unit["stand_in"].sum())
        first = here.stop
    return seen


def _distance(moments: Moments, reference: Reference) -> float:
    statistics = moments.statistics()
    check_finite("features of samples", *statistics)
    return metrics.frechet_distance(*statistics, reference.mean, reference.covariance)


def _frechet(seen: Seen, reference: Reference) -> dict[str, Any]:
    total = reduce(Moments.merge, seen.groups)
    value = _distance(total, reference)
    without = []
    for g in range(_GROUPS):
        others = reduce(Moments.merge, seen.groups[:g] + seen.groups[g + 1 :])
        without.append(_distance(others, reference))
    return figure(value, metrics.jackknife_interval(value, without), total.number)


def _inception_score(context: Context, seen: Seen) -> dict[str, Any]:
    scores = seen.splits.scores()
    mean = float(scores.mean())
    spread = metrics.score_spread(scores, context.options.score_protocol)
    reach = 1.96 * spread / np.sqrt(len(scores))
    interval = (mean - reach, mean + reach)
    return {
        "score": figure(mean, interval, context.options.num_samples),
        "spread": figure(spread, None, len(scores)),
    }


def _pairs(fake: np.ndarray, real: np.ndarray) -> dict[str, Any]:
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
    return {
        "kernel": figure(mean, (mean - reach, mean + reach), size * _GROUPS),
        "precision": share(round(precision * count), count),
        "recall": share(round(recall * count), count),
    }


def _write(context: Context, out: epath.Path, seen: Seen, reference: Reference) -> None:
    """Statistics of both sides as the usual tools read them, and a grid of samples."""
    sides = {
        "reference": (reference.mean, reference.covariance),
        "sample": reduce(Moments.merge, seen.groups).statistics(),
    }
    for side, (mean, covariance) in sides.items():
        arrays = {"mu": mean, "sigma": covariance}
        storage.write_npz(out / f"{side}_statistics.npz", arrays)
    images = np.concatenate(seen.shown).astype(np.float32) / np.float32(255)
    labels = np.arange(len(images)) % context.config.model.num_classes
    title = f"samples, {seen.num_steps} steps"
    context.sample_grid(out / "samples.png", {title: (images, labels)})


def _protocol(
    context: Context,
    extractor: Extractor,
    reference: Reference,
    curve: Mapping[int, float],
    seen: Seen,
) -> dict[str, Any]:
    options, config = context.options, context.config
    return {
        "extractor": extractor.description,
        "reference": reference.description,
        "samples": options.num_samples,
        "labels": "0 to K-1 cyclically",
        "seeds": config.data.seeds,
        "sampler": recipes.resolved(config.evaluate.samples.sampler),
        "step_size": config.evaluate.samples.step_size,
        "num_steps": seen.num_steps,
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
        "notes": _notes(context, reference, curve, seen),
        "undecodable_seeds": seen.stand_ins,
    }


def _notes(
    context: Context, reference: Reference, curve: Mapping[int, float], seen: Seen
) -> list[str]:
    """What a reader of the scores must know."""
    number, notes = context.options.num_samples, []
    if number <= len(reference.mean):
        notes.append(
            "fewer samples than features: their covariance is singular, and the "
            "Frechet distance is biased upwards"
        )
    if number % context.config.model.num_classes:
        notes.append("the number of samples is no multiple of the number of classes")
    if curve and seen.num_steps in (min(curve), max(curve)):
        notes.append(
            "the best number of steps lies at the edge of the sweep: a wider one "
            "(--sweep) or another config.evaluate.samples.num_steps may find a better"
        )
    if reference.features is None:
        notes.append(
            "no kernel distance, precision, recall: only statistics were given"
        )
    if seen.stand_ins:
        notes.append(
            f"{seen.stand_ins} samples began at the next image of the seeds, as theirs "
            "cannot be decoded"
        )
    return notes
