"""Calibration before and after temperature scaling (method: section 6)."""

from typing import Any

import numpy as np
from etils import epath

from atebm_jax import metrics
from atebm_jax.evaluate import figures
from atebm_jax.evaluate.classification import logits
from atebm_jax.evaluate.context import Context, figure

NUM_BINS = 15


def run(context: Context, out: epath.Path) -> dict[str, Any]:
    """ECE, adaptive ECE, MCE, Brier score and likelihood, each before and after.

    The temperature is fitted on `data.eval`; where that is the test set itself, on
    every second image of it, and everything is reported for the others.
    """
    scores, labels = logits(context, "test")
    same = context.sources["eval"].spec == context.sources["test"].spec
    if same:
        fitting = np.arange(len(labels)) % 2 == 0
        held_out = scores[fitting], labels[fitting]
        scores, labels = scores[~fitting], labels[~fitting]
    else:
        held_out = logits(context, "eval")
    temperature = metrics.fit_temperature(*held_out)
    values: dict[str, Any] = {
        "temperature": figure(temperature, None, len(held_out[1]))
    }
    diagrams = {}
    for moment, scaled in {"before": scores, "after": scores / temperature}.items():
        values |= {
            f"{name}_{moment}": number
            for name, number in _scores(context, scaled, labels).items()
        }
        diagrams[f"{moment} scaling"] = metrics.reliability(scaled, labels, NUM_BINS)
    figures.reliability(out / "reliability.png", diagrams)
    protocol = {
        "bins": NUM_BINS,
        "fitted_on": "every second test image" if same else "data.eval",
        "reported_for": "the other test images" if same else "data.test",
        "criterion": "negative log-likelihood",
        "interval": f"normal, error of {context.options.num_resamples} bootstraps",
    }
    return {"protocol": protocol, "figures": values}


def _scores(
    context: Context, scores: np.ndarray, labels: np.ndarray
) -> dict[str, dict[str, Any]]:
    values = metrics.calibration(scores, labels, NUM_BINS)
    low, high = metrics.bootstrap_interval(
        lambda z, y: np.array(metrics.calibration(z, y, NUM_BINS)),
        [scores, labels],
        paired=True,
        num_resamples=context.options.num_resamples,
        seed=context.options.seed,
    )
    return {
        name: figure(value, (low[i], high[i]), len(labels))
        for i, (name, value) in enumerate(values._asdict().items())
    }
