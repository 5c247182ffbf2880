"""Clean accuracy, and accuracy under PGD against the radius (method: section 6)."""

from typing import Any

import jax
import numpy as np
from etils import epath

from atebm_jax import attacks, losses, metrics
from atebm_jax.evaluate import figures
from atebm_jax.evaluate.context import Context, Network, check_finite, figure


def logits(context: Context, role: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, K] and labels [N] of a data set.

    Raises:
      UserError: some logits are no numbers.
    """
    rows = context.map_images(
        f"logits of {role}", role, lambda network, x, y: {"logits": network.logits(x)}
    )
    check_finite(f"logits of {role}", rows["logits"])
    return rows["logits"], rows["labels"]


def accuracy(context: Context, out: epath.Path) -> dict[str, Any]:
    """Top-1 (and from 10 classes on top-5) accuracy with Wilson intervals."""
    del out
    scores, labels = logits(context, "test")
    values = {"clean_accuracy": _share(scores.argmax(axis=1) == labels)}
    if scores.shape[1] >= 10:
        best = np.argpartition(-scores, 4, axis=1)[:, :5]
        values["top5_accuracy"] = _share((best == labels[:, None]).any(axis=1))
    return {"protocol": {"data": "test", "interval": "Wilson"}, "figures": values}


def pgd(context: Context, out: epath.Path) -> dict[str, Any]:
    """Accuracy under the config's PGD, and its curve over radii.

    An image is robust if it is classified correctly both as it is and attacked. The
    step length is the config's at the config's radius and grows with the radius.
    """
    settings = context.config.evaluate.attack
    radii = tuple(context.options.epsilons) or tuple(
        float(settings.epsilon) * factor for factor in (0.25, 0.5, 1.0, 1.5, 2.0)
    )
    values, curve = {}, {}
    for epsilon in sorted({*radii, float(settings.epsilon)}):
        step_size = settings.step_size * epsilon / settings.epsilon
        robust = _attacked(
            context, settings.norm, epsilon, step_size, settings.num_steps
        )
        curve[epsilon] = _share(robust)
        values[f"robust_accuracy_{settings.norm}_{epsilon:g}"] = curve[epsilon]
    scores, labels = logits(context, "test")
    clean = _share(scores.argmax(axis=1) == labels)
    figures.robust_curve(
        out / "robust_accuracy.png", {0.0: clean} | curve, settings.norm
    )
    protocol = {
        "attack": "PGD on the cross-entropy, no random start, no restart",
        "norm": settings.norm,
        "num_steps": settings.num_steps,
        "step_size": f"{settings.step_size:g} at radius {settings.epsilon:g}, in "
        "proportion elsewhere",
        "interval": "Wilson",
    }
    return {
        "protocol": protocol,
        "figures": values,
        "plots": ["robust_accuracy.png"],
    }


def _attacked(
    context: Context, norm: str, epsilon: float, step_size: float, num_steps: int
) -> np.ndarray:
    threat = attacks.threat(norm, epsilon)

    def robust(network: Network, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        attacked = attacks.pgd(
            lambda images: losses.cross_entropy(network.logits(images), y),
            x,
            threat=threat,
            step_size=step_size,
            num_steps=num_steps,
        )
        clean = metrics.accuracy(network.logits(x), y)
        return {"robust": clean & metrics.accuracy(network.logits(attacked), y)}

    rows = context.map_images(
        f"PGD {norm} {epsilon:g}",
        "test",
        robust,
        step_size=step_size,
        num_steps=num_steps,
    )
    return rows["robust"]


def _share(hits: np.ndarray) -> dict[str, Any]:
    number, total = int(hits.sum()), len(hits)
    interval = metrics.wilson_interval(number, total)
    return figure(number / total, interval, total)
