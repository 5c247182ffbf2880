"""Clean accuracy, and accuracy under PGD against the radius (method: section 6)."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from atebm_jax import attacks, metrics, pictures
from atebm_jax.errors import UserError
from atebm_jax.evaluate.context import Context, Rows, RowsFn, check_finite, share_of
from atebm_jax.models import LogitsFn


def logits(
    context: Context, role: str, attacked: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, K], all finite or a `UserError`, and labels [N] of a data set.

    They are those of the images, or of what the config's PGD makes of them.
    """
    attack = context.config.evaluate.attack.to_dict() if attacked else {}
    adversary = attacks.adversary(**attack) if attacked else lambda logits_fn, x, y: x

    def rows(logits_fn: LogitsFn, x: jax.Array, y: jax.Array) -> Rows:
        return {"logits": logits_fn(adversary(logits_fn, x, y))}

    name = f"logits of {'attacked ' * attacked}{role}"
    found = context.map_images(name, role, rows, **attack)
    check_finite(name, found["logits"])
    return found["logits"], found["labels"]


def accuracy(context: Context, out: epath.Path) -> dict[str, Any]:
    """Top-1 (and from 10 classes on top-5) accuracy with Wilson intervals."""
    del out
    scores, labels = logits(context, "test")
    values = {"clean_accuracy": share_of(scores.argmax(axis=1) == labels)}
    if scores.shape[1] >= 10:
        best = np.argpartition(-scores, 4, axis=1)[:, :5]
        values["top5_accuracy"] = share_of((best == labels[:, None]).any(axis=1))
    return {"protocol": {"data": "test", "interval": "Wilson"}, "figures": values}


def check_pgd(context: Context) -> None:
    """Refuses with a `UserError` an attack that cannot be, at any radius."""
    # First the config's own radius: the others are multiples of it.
    attacks.adversary(**context.config.evaluate.attack)
    for attack in _attacks(context).values():
        attacks.adversary(**attack)


def pgd(context: Context, out: epath.Path) -> dict[str, Any]:
    """Accuracy under the config's PGD, and its curve over radii.

    The adversary is that of the evaluation during training, including momentum and
    `keep_best`. An image counts as robust if it is classified correctly both as it is
    and attacked. The step length is the config's at the config's radius and grows in
    proportion to the radius.
    """
    settings = context.config.evaluate.attack
    values, curve = {}, {}
    for epsilon, attack in _attacks(context).items():
        rows = context.map_images(
            f"PGD {attack.norm} {attack.epsilon:g}",
            "test",
            under_attack(attack),
            step_size=attack.step_size,
            num_steps=attack.num_steps,
            momentum=attack.momentum,
            keep_best=attack.keep_best,
        )
        curve[epsilon] = share_of(rows["robust"])
        values[f"robust_accuracy_{settings.norm}_{epsilon:g}"] = curve[epsilon]
    plots = []
    if all(map(math.isfinite, curve)):
        scores, labels = logits(context, "test")
        curve[0.0] = share_of(scores.argmax(axis=1) == labels)
        plots = ["robust_accuracy.png"]
        pictures.curve(
            out / plots[0],
            {radius: point["value"] for radius, point in curve.items()},
            (f"{settings.norm} radius, pixels of a [0, 1] image", "accuracy"),
            bounds={radius: point["interval_95"] for radius, point in curve.items()},
            title="accuracy under PGD, 95 % intervals",
        )
    protocol = {
        "attack": "PGD on the cross-entropy, no random start, no restart",
        "norm": settings.norm,
        "num_steps": settings.num_steps,
        "step_size": f"{settings.step_size:g} at radius {_radius(settings):g}, in "
        "proportion elsewhere",
        "momentum": settings.momentum,
        "keep_best": settings.keep_best,
        "interval": "Wilson",
    }
    return {"protocol": protocol, "figures": values, "plots": plots}


def _attacks(context: Context) -> dict[float, ml_collections.ConfigDict]:
    """The config's attack at every radius of the curve, in their order."""
    settings, radii = context.config.evaluate.attack, context.options.epsilons
    own = _radius(settings)
    if radii and math.isinf(max(own, *radii)):
        raise UserError(
            f"--epsilons={','.join(f'{r:g}' for r in radii)}, and the radius of "
            f"config.evaluate.attack is {own:g}: step lengths grow with the radius, so "
            "all must be finite; leave out the flag or the infinite radius."
        )
    factors = (1.0,) if math.isinf(own) else (0.25, 0.5, 1.0, 1.5, 2.0)
    made = {}
    for epsilon in sorted({own, *(radii or (own * factor for factor in factors))}):
        # Exactly the config's own step at its own radius, which may be infinite.
        factor = 1.0 if epsilon == own else epsilon / own
        lengths = {"epsilon": float(epsilon), "step_size": settings.step_size * factor}
        made[epsilon] = ml_collections.ConfigDict(settings.to_dict() | lengths)
    return made


def _radius(settings: ml_collections.ConfigDict) -> float:
    return math.inf if settings.norm == "unbounded" else float(settings.epsilon)


def under_attack(attack: Mapping[str, Any]) -> RowsFn:
    """Which images are classified correctly: "clean", and both clean and attacked.

    `attack` is one as `config.evaluate.attack`.
    """
    adversary = attacks.adversary(**attack)

    def rows(logits_fn: LogitsFn, x: jax.Array, y: jax.Array) -> Rows:
        clean = metrics.accuracy(logits_fn(x), y)
        attacked = metrics.accuracy(logits_fn(adversary(logits_fn, x, y)), y)
        return {"clean": clean, "robust": clean & attacked}

    return rows
