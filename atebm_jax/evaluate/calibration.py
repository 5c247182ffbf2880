"""Calibration before and after temperature scaling (method: section 6)."""

from typing import Any, NamedTuple

import numpy as np
from etils import epath

from atebm_jax import metrics, pictures
from atebm_jax.errors import UserError
from atebm_jax.evaluate.classification import logits
from atebm_jax.evaluate.context import Context, figure

NUM_BINS = 15
# Held-out images that a temperature needs.
_SMALLEST = 20


def run(context: Context, out: epath.Path) -> dict[str, Any]:
    """ECE, adaptive ECE, MCE, Brier score and likelihood, each before and after.

    The temperature is fitted on the images of `data.eval` that are no test images. If
    too few are left, it is fitted on every second test image, and all figures are those
    of the others.
    """
    split = _split(context)
    temperature = metrics.fit_temperature(*split.fitting)
    error = 1.96 * metrics.temperature_error(*split.fitting, temperature)
    ends = (max(temperature - error, 0.0), temperature + error)
    interval = ends if error < np.inf else None
    values = {"temperature": figure(temperature, interval, len(split.fitting[1]))}
    diagrams = {}
    scores, labels = split.reporting
    for moment, scaled in {"before": scores, "after": scores / temperature}.items():
        figures = _figures(context, scaled, labels)
        values |= {f"{name}_{moment}": found for name, found in figures.items()}
        diagrams[f"{moment} scaling"] = metrics.reliability(scaled, labels, NUM_BINS)
    pictures.reliability(out / "reliability.png", diagrams)
    protocol = {
        "bins": NUM_BINS,
        **split.description,
        "criterion": "negative log-likelihood",
        "interval": f"normal, error of {context.options.num_resamples} bootstraps; "
        "temperature: normal, robust error of the likelihood's maximum",
    }
    return {"protocol": protocol, "figures": values, "plots": ["reliability.png"]}


class Split(NamedTuple):
    """Logits [N, K] and labels [N] to fit on and to report; what they are."""

    fitting: tuple[np.ndarray, np.ndarray]
    reporting: tuple[np.ndarray, np.ndarray]
    description: dict[str, Any]


def _split(context: Context) -> Split:
    """Splits images into those to fit on and those to report."""
    scores, labels = logits(context, "test")
    if context.sources["eval"].spec != context.sources["test"].spec:
        fitting, fitting_labels = logits(context, "eval")
        fresh = ~_among(context.digests("eval"), context.digests("test"))
        if fresh.sum() >= _SMALLEST:
            description = {
                "fitted_on": context.describe_data("eval"),
                "left_out_as_test_images": int((~fresh).sum()),
                "reported_for": "all test images",
            }
            held_out = fitting[fresh], fitting_labels[fresh]
            return Split(held_out, (scores, labels), description)
    if len(labels) < 2:
        asked = context.options.num_examples == 1
        raise UserError(
            f"{'--num_examples' if asked else 'the number of test images'} is "
            f"{len(labels)}: calibration needs two test images or more, one to fit the "
            "temperature on, one to report."
        )
    description = {
        "fitted_on": "every second test image",
        "reported_for": "the other test images",
    }
    even = np.arange(len(labels)) % 2 == 0
    halves = [(scores[half], labels[half]) for half in (even, ~even)]
    return Split(halves[0], halves[1], description)


def _among(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> np.ndarray:
    """[N] bool, which of some images are among others, by their digests."""
    known = {digest.tobytes() for digest in others["digests"]}
    return np.array([digest.tobytes() in known for digest in some["digests"]], bool)


def _figures(
    context: Context, scores: np.ndarray, labels: np.ndarray
) -> dict[str, dict[str, Any]]:
    values = metrics.calibration(scores, labels, NUM_BINS)
    low, high = metrics.bootstrap_interval(
        lambda z, y: np.array(metrics.calibration(z, y, NUM_BINS)),
        [scores, labels],
        paired=True,
        bounds=(0.0, np.inf),  # all of them are errors
        **context.options.resampling,
    )
    return {
        name: figure(value, (low[i], high[i]), len(labels))
        for i, (name, value) in enumerate(values._asdict().items())
    }
