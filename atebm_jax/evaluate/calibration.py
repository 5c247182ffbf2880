"""Calibration before and after temperature scaling (method: section 6)."""

from typing import Any

import numpy as np
from etils import epath

from atebm_jax import metrics, pictures
from atebm_jax.errors import UserError
from atebm_jax.evaluate.classification import logits
from atebm_jax.evaluate.context import Context, figure

#: Logits [N, K] and labels [N].
Labelled = tuple[np.ndarray, np.ndarray]

NUM_BINS = 15
# Held-out images that a temperature needs.
_SMALLEST = 20


def run(context: Context, out: epath.Path) -> dict[str, Any]:
    """ECE, adaptive ECE, MCE, Brier score and likelihood, each before and after.

    The temperature is fitted on the images of `data.eval` that are no test images. If
    too few are left, it is fitted on every second test image, and all figures are those
    of the others.
    """
    fitting, (scores, labels), described = _split(context)
    temperature = metrics.fit_temperature(*fitting)
    error = 1.96 * metrics.temperature_error(*fitting, temperature)
    ends = (max(temperature - error, 0.0), temperature + error)
    interval = ends if error < np.inf else None
    values = {"temperature": figure(temperature, interval, len(fitting[1]))}
    diagrams = {}
    for moment, scaled in {"before": scores, "after": scores / temperature}.items():
        figures = _figures(context, scaled, labels)
        values |= {f"{name}_{moment}": found for name, found in figures.items()}
        diagrams[f"{moment} scaling"] = metrics.reliability(scaled, labels, NUM_BINS)
    pictures.reliability(out / "reliability.png", diagrams)
    protocol = {
        "bins": NUM_BINS,
        **described,
        "criterion": "negative log-likelihood",
        "interval": f"normal, error of {context.options.num_resamples} bootstraps; "
        "temperature: normal, robust error of the likelihood's maximum",
    }
    return {"protocol": protocol, "figures": values, "plots": ["reliability.png"]}


def _split(context: Context) -> tuple[Labelled, Labelled, dict[str, Any]]:
    """What to fit on, what to report, and what they are."""
    scores, labels = logits(context, "test")
    if context.sources["eval"].spec != context.sources["test"].spec:
        fitting, fitting_labels = logits(context, "eval")
        fresh = ~_among(context.digests("eval"), context.digests("test"))
        if fresh.sum() >= _SMALLEST:
            described = {
                "fitted_on": context.describe_data("eval"),
                "left_out_as_test_images": int((~fresh).sum()),
                "reported_for": "all test images",
            }
            held_out = fitting[fresh], fitting_labels[fresh]
            return held_out, (scores, labels), described
    if len(labels) < 2:
        asked = context.options.num_examples == 1
        raise UserError(
            f"{'--num_examples' if asked else 'the number of test images'} is "
            f"{len(labels)}: calibration needs two test images or more, one to fit the "
            "temperature on, one to report."
        )
    described = {
        "fitted_on": "every second test image",
        "reported_for": "the other test images",
    }
    even = np.arange(len(labels)) % 2 == 0
    halves = [(scores[half], labels[half]) for half in (even, ~even)]
    return halves[0], halves[1], described


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
