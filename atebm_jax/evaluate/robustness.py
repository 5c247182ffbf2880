"""Robust accuracy under AutoAttack (method: section 6), resumable."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from atebm_jax import autoattack, models, sharding, storage
from atebm_jax.autoattack import versions
from atebm_jax.evaluate.context import Context, share_of


def plan(context: Context) -> versions.Plan:
    """The attacks of the ensemble, and the threat; a `UserError` if one is unknown."""
    options, default = context.options, context.config.evaluate.attack
    norm = default.norm if options.norm is None else options.norm
    epsilon = default.epsilon if options.epsilon is None else options.epsilon
    return versions.plan(
        options.version,
        (norm, float(epsilon)),
        context.config.model.num_classes,
        names=options.attacks or None,
    )


def run(context: Context, out: epath.Path) -> dict[str, Any]:
    """Robust accuracy after each attack of the ensemble, as the original counts it.

    Batches are split over the devices of all processes, and finished ones are stored.
    With `Options.save_adversarial`, `autoattack.npz` holds the adversarial images.

    Raises:
      UserError: as of `plan`.
    """
    options, planned = context.options, plan(context)
    norm, epsilon = planned.norm, planned.epsilon
    images, labels = context.images("test", context.limit("test"))
    store = context.store.within(
        part="autoattack",
        source=context.sources["test"].spec,
        content=context.fingerprints["test"],
        preprocess=context.preprocess("test"),
        norm=norm,
        epsilon=epsilon,
        version=options.version,
        attacks=list(options.attacks),
        settings=planned.settings._asdict(),
    )
    done = [_unit(arrays) for arrays in store.units()]
    numbers = itertools.count(len(done))
    result = autoattack.run(
        jax.random.key(options.seed),
        models.freeze(context.model, context.variables, context.image_shape),
        images.astype(np.float32) / np.float32(255),
        labels,
        threat=(norm, epsilon),
        version=options.version,
        attacks=options.attacks or None,
        batch_size=context.config.evaluate.batch_size,
        sharding=sharding.batched(context.mesh),
        done=done,
        on_unit=lambda unit: store.save(next(numbers), unit._asdict()),
        on_progress=_shower(context),
    )
    if options.save_adversarial and jax.process_index() == 0:
        saved = {"images": result.adversarial, "labels": labels, "clean": result.clean}
        saved["robust"] = np.asarray(list(result.robust.values())[-1])
        storage.write_npz(out / "autoattack.npz", saved, compressed=True)
    masks = {"clean": result.clean} | result.robust
    return {
        "protocol": {
            "attack": f"{planned.title} (native)",
            "norm": norm,
            "epsilon": epsilon,
            "attacks": list(planned.attacks),
            "settings": planned.settings_in_use(),
            "count": "correct after this attack and all before it",
            "interval": "Wilson",
            "notes": list(result.notes),
        },
        "figures": {
            f"accuracy_after_{name}": share_of(mask) for name, mask in masks.items()
        },
    }


def _shower(context: Context) -> Callable[[autoattack.Progress], None]:
    """Shows the current round, and all rounds as if no more images fell."""
    before = 0

    def show(progress: autoattack.Progress) -> None:
        nonlocal before
        later = progress.num_rounds - progress.round_index - 1
        left = progress.of - progress.done + later * progress.robust
        done = before + progress.done
        context.show("AutoAttack, images of all rounds", done, done + left)
        context.show(f"AutoAttack {progress.attack}", progress.done, progress.of)
        before = done if progress.done == progress.of else before

    return show


def _unit(stored: dict[str, Any]) -> autoattack.Unit:
    words = {"attack": str(stored["attack"]), "number": int(stored["number"])}
    return autoattack.Unit(**(stored | words))
