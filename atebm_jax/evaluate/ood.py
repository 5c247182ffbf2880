"""Telling images of other distributions apart, clean and attacked (section 6).

All scores are higher for images that look in distribution. The attack raises the score
in use on out-of-distribution images, inside an L2 ball.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from atebm_jax import attacks, energy, losses, metrics, pictures
from atebm_jax.errors import UserError
from atebm_jax.evaluate.context import (
    Context,
    Options,
    Rows,
    RowsFn,
    check_finite,
    figure,
)
from atebm_jax.models import LogitsFn
from atebm_jax.names import for_files, printable

ScoreFn = Callable[[LogitsFn, jax.Array], jax.Array]


def max_softmax(logits_fn: LogitsFn, images: jax.Array) -> jax.Array:
    """Largest class probability (Hendrycks and Gimpel, 2017)."""
    return energy.class_probabilities(logits_fn(images)).max(axis=-1)


def max_logit(logits_fn: LogitsFn, images: jax.Array) -> jax.Array:
    """Largest logit (Hendrycks et al., 2022)."""
    return logits_fn(images).max(axis=-1)


def log_density(logits_fn: LogitsFn, images: jax.Array) -> jax.Array:
    """-E(x), the unnormalised log-density (Liu et al., 2020)."""
    return energy.score(logits_fn(images))


def negative_gradient_norm(logits_fn: LogitsFn, images: jax.Array) -> jax.Array:
    """-||grad_x log p(x)||_2: small gradients mean typical (Grathwohl et al., 2020)."""
    gradients = jax.grad(lambda x: energy.score(logits_fn(x)).sum())(images)
    # The offset keeps the attack's own gradient finite where this one is zero.
    squares = jnp.square(gradients).sum(axis=(1, 2, 3))
    return -jnp.sqrt(squares + 1e-12)


def away_from_uniform(logits_fn: LogitsFn, images: jax.Array) -> jax.Array:
    """KL(uniform || softmax f(x)): what raises the max-softmax."""
    return losses.from_uniform(logits_fn(images))


class Detector(NamedTuple):
    """A score, and what an attack on it ascends."""

    score: ScoreFn
    attacked: ScoreFn


#: Scores by name.
DETECTORS: dict[str, Detector] = {
    "max_softmax": Detector(max_softmax, away_from_uniform),
    "max_logit": Detector(max_logit, max_logit),
    "log_density": Detector(log_density, log_density),
    "gradient_norm": Detector(negative_gradient_norm, negative_gradient_norm),
}


class Budget(NamedTuple):
    """L2 radius, step length and number of steps of the attack."""

    epsilon: float
    step_size: float
    num_steps: int


def budget(image_shape: tuple[int, int, int]) -> Budget:
    """Of method section 6: CIFAR's up to 64 pixels a side, ImageNet's above."""
    small = max(image_shape[:2]) <= 64
    return Budget(1.0, 0.1, 20) if small else Budget(3.0, 1.0, 10)


def attack(
    logits_fn: LogitsFn, images: jax.Array, detector: Detector, limits: Budget
) -> jax.Array:
    """Raises a detector's score inside the ball: [B, H, W, C] -> [B, H, W, C]."""
    return attacks.attack(
        lambda x: detector.attacked(logits_fn, x),
        images,
        attacks.l2(limits.epsilon),
        step_size=limits.step_size,
        num_steps=limits.num_steps,
    )


def check(context: Context) -> None:
    """Refuses to detect nothing with a `UserError`."""
    if not context.options.ood:
        raise UserError(
            "--ood is empty: give noise or a source, or leave out the metric ood."
        )


def sources(settings: ml_collections.ConfigDict, options: Options) -> dict[str, str]:
    """The sets that are asked for, by their own names."""
    return {spec: spec for spec in options.ood}


def run(context: Context, out: epath.Path) -> dict[str, Any]:
    """AUROC, AUPR and FPR at 95 % TPR of every score against every set."""
    limits = budget(context.image_shape)
    inside = context.map_images("scores of test", "test", _scores(None))
    check_finite("scores of test", *inside.values())
    values: dict[str, Any] = {}
    plots: list[str] = []
    for role in context.options.ood:
        sets = {
            "clean": context.map_images(f"scores of {role}", role, _scores(None)),
            "attacked": context.map_images(
                f"attacked scores of {role}", role, _scores(limits), **limits._asdict()
            ),
        }
        for moment, outside in sets.items():
            for name in DETECTORS:
                prefix = f"{role}/{name}/{moment}"
                values |= _figures(context, prefix, inside[name], outside[name])
        name = for_files("".join(c if c.isalnum() else "_" for c in role))
        plot = f"ood_{name}.png"
        plots.append(plot if plot not in plots else f"{len(plots)}_{plot}")
        pictures.detection(
            out / plots[-1], printable(role), tuple(DETECTORS), inside, sets
        )
    protocol = {
        "positive": "test images; higher scores mean in distribution",
        "sets": {role: context.describe_data(role) for role in context.options.ood},
        "attack": {
            "on": "the score in use; max_softmax through KL(uniform || softmax)",
            "norm": "l2",
            **limits._asdict(),
        },
        "interval": "auroc: Newcombe; others: normal, error of "
        f"{context.options.num_resamples} bootstraps, or Wilson where that is wider",
    }
    return {"protocol": protocol, "figures": values, "plots": plots}


def _scores(limits: Budget | None) -> RowsFn:
    """Every score of images, attacked within limits or as they are."""

    def scores(logits_fn: LogitsFn, x: jax.Array, y: jax.Array) -> Rows:
        del y
        rows = {}
        for name, detector in DETECTORS.items():
            images = x if limits is None else attack(logits_fn, x, detector, limits)
            rows[name] = detector.score(logits_fn, images)
        return rows

    return scores


def _figures(
    context: Context, prefix: str, inside: np.ndarray, outside: np.ndarray
) -> dict[str, Any]:
    check_finite(f"scores of {prefix}", inside, outside)
    numbers = len(inside), len(outside)
    area = float(metrics.auroc(inside, outside))
    interval = metrics.auroc_interval(area, *numbers)
    result = {f"{prefix}/auroc": figure(area, interval, sum(numbers))}
    measures: dict[str, tuple[Callable[..., float], int]] = {
        "aupr_in": (metrics.average_precision, numbers[0]),
        "aupr_out": (lambda a, b: metrics.average_precision(-b, -a), numbers[1]),
        "fpr95": (metrics.fpr_at_tpr, numbers[1]),
    }
    for name, (measure, number) in measures.items():
        value = measure(inside, outside)
        ends = metrics.bootstrap_interval(
            measure,
            [inside, outside],
            paired=False,
            bounds=(0.0, 1.0),
            **context.options.resampling,
        )
        # Resampling cannot see beyond a perfect separation; Wilson's interval can.
        share = metrics.wilson_interval(round(value * number), number)
        widest = min(ends[0], share[0]), max(ends[1], share[1])
        result[f"{prefix}/{name}"] = figure(value, widest, sum(numbers))
    return result
