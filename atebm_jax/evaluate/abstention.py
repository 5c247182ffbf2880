"""Leaving out what the model is not sure of: error against the share that is answered.

Risk-coverage curves (Geifman and El-Yaniv, 2017), on test images as they are and under
the config's PGD on the cross-entropy, which knows nothing of the abstention.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from atebm_jax import attacks, metrics, pictures
from atebm_jax.evaluate import ood
from atebm_jax.evaluate.classification import logits
from atebm_jax.evaluate.context import Context, figure, share_of

# How sure the model is: those of `ood.DETECTORS` that see the logits alone.
_CONFIDENCES = ("max_softmax", "log_density")


def check(context: Context) -> None:
    """Refuses with a `UserError` an attack that cannot be."""
    attacks.adversary(**context.config.evaluate.attack)


def run(context: Context, out: epath.Path) -> dict[str, Any]:
    """Area under the risk-coverage curve by max-softmax and by -E(x)."""
    values: dict[str, Any] = {}
    curves: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for moment in ("clean", "attacked"):
        scores, labels = logits(context, "test", attacked=moment == "attacked")
        hits = scores.argmax(axis=1) == labels
        values[f"{moment}/error"] = share_of(~hits)
        curves[moment] = {}
        for name in _CONFIDENCES:
            score = ood.DETECTORS[name].score
            confidence = np.asarray(score(lambda z: z, jnp.asarray(scores)))
            curve = metrics.risk_coverage(confidence, hits)
            curves[moment][name] = curve
            interval = metrics.bootstrap_interval(
                lambda *rows: metrics.risk_coverage(*rows)[1].mean(),
                [confidence, hits],
                paired=True,
                bounds=(0.0, 1.0),
                **context.options.resampling,
            )
            values[f"{moment}/{name}/aurc"] = figure(
                curve[1].mean(), interval, len(hits)
            )
    pictures.risk_coverage(out / "abstention.png", curves)
    protocol = {
        "aurc": "mean over coverages of the error among the most confident images, "
        "those of equal confidence taken together",
        "attack": context.config.evaluate.attack.to_dict(),
        "interval": "error: Wilson; areas: normal, error of "
        f"{context.options.num_resamples} bootstraps",
    }
    return {"protocol": protocol, "figures": values, "plots": ["abstention.png"]}
