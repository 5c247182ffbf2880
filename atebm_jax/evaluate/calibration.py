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

    The temperature is fitted on the images of `data.eval` that are no test images;
    where too few are left, on every second test image, and everything is reported for
    the others.
    """
    split = _split(context)
    temperature = metrics.fit_temperature(*split.fitting)
    error = 1.96 * metrics.temperature_error(*split.fitting, temperature)
    ends = (max(temperature - error, 0.0), temperature + error)
    values: dict[str, Any] = {
        "temperature": figure(
            temperature, ends if error < np.inf else None, len(split.fitting[1])
        )
    }
    diagrams = {}
    scores, labels = split.reporting
    for moment, scaled in {"before": scores, "after": scores / temperature}.items():
        values |= {
            f"{name}_{moment}": number
            for name, number in _scores(context, scaled, labels).items()
        }
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
    """Images to fit on that are none of those to report."""
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
    even = np.arange(len(labels)) % 2 == 0
    if len(labels) < 2:
        asked = context.options.num_examples == 1
        raise UserError(
            f"{'--num_examples' if asked else 'the number of test images'} is "
            f"{len(labels)}: calibration needs two test images or more, one to fit the "
            "temperature on, one to report."
        )
    return Split(
        (scores[even], labels[even]),
        (scores[~even], labels[~even]),
        {
            "fitted_on": "every second test image",
            "reported_for": "the other test images",
        },
    )


def _among(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> np.ndarray:
    """[N] bool, which of some images are among others, by their digests."""
    known = {digest.tobytes() for digest in others["digests"]}
    return np.array([digest.tobytes() in known for digest in some["digests"]], bool)


def _scores(
    context: Context, scores: np.ndarray, labels: np.ndarray
) -> dict[str, dict[str, Any]]:
    values = metrics.calibration(scores, labels, NUM_BINS)
    # All of them errors, none below zero.
    low, high = metrics.bootstrap_interval(
        lambda z, y: np.array(metrics.calibration(z, y, NUM_BINS)),
        [scores, labels],
        paired=True,
        num_resamples=context.options.num_resamples,
        seed=context.options.seed,
        bounds=(0.0, np.inf),
    )
    return {
        name: figure(value, (low[i], high[i]), len(labels))
        for i, (name, value) in enumerate(values._asdict().items())
    }
