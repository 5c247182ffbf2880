"""Robust accuracy under AutoAttack (method: section 6), resumable."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from atebm_jax import autoattack, metrics, sharding, storage
from atebm_jax.autoattack import versions
from atebm_jax.evaluate.context import Context, figure
from atebm_jax.evaluate.store import Store


def check(context: Context) -> None:
    """Refuses what is no version, threat or attack of the ensemble.

    Raises:
      UserError: says which.
    """
    _plan(context)


def _plan(context: Context) -> versions.Plan:
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

    Batches are split over the devices of all processes. Every finished one is stored;
    `autoattack.npz` holds the adversarial images where they are asked for.

    Raises:
      UserError: a threat, version or attack that there is not.
    """
    options, plan = context.options, _plan(context)
    norm, epsilon = plan.norm, plan.epsilon
    images, labels = context.images("test")
    store = context.store.within(
        part="autoattack",
        source=context.sources["test"].spec,
        content=context.fingerprints["test"],
        preprocess=context.preprocess("test"),
        norm=norm,
        epsilon=epsilon,
        version=options.version,
        attacks=list(options.attacks),
        settings=plan.settings._asdict(),
    )
    units = list(_stored(store))
    position = len(units)

    def save(unit: autoattack.Unit) -> None:
        nonlocal position
        store.save(f"{position:06d}", unit._asdict())
        position += 1

    result = autoattack.run(
        jax.random.key(options.seed),
        jax.tree_util.Partial(context.model.apply, context.variables),
        images.astype(np.float32) / np.float32(255),
        labels,
        threat=(norm, epsilon),
        version=options.version,
        attacks=options.attacks or None,
        batch_size=context.config.evaluate.batch_size,
        sharding=sharding.batched(context.mesh),
        done=units,
        on_unit=save,
        on_progress=_shower(context),
    )
    if options.save_adversarial and jax.process_index() == 0:
        saved = {"images": result.adversarial, "labels": labels, "clean": result.clean}
        saved["robust"] = np.asarray(list(result.robust.values())[-1])
        storage.write_npz(out / "autoattack.npz", saved, compressed=True)
    total = len(result.clean)
    masks = {"clean": result.clean} | result.robust
    return {
        "protocol": {
            "attack": f"{plan.title} (native)",
            "norm": norm,
            "epsilon": epsilon,
            "attacks": list(plan.attacks),
            "settings": plan.settings_in_use(),
            "count": "correct after this attack and all before it",
            "interval": "Wilson",
            "notes": list(result.notes),
        },
        "figures": {
            f"accuracy_after_{name}": figure(
                mask.mean(), metrics.wilson_interval(int(mask.sum()), total), total
            )
            for name, mask in masks.items()
        },
    }


def _shower(context: Context) -> Callable[[autoattack.Progress], None]:
    """Shows the round that runs and, as if no more images fell, the whole."""
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


def _stored(store: Store) -> Iterator[autoattack.Unit]:
    position = 0
    while (arrays := store.load(f"{position:06d}")) is not None:
        yield autoattack.Unit(
            str(arrays["attack"]),
            int(arrays["number"]),
            arrays["indices"],
            arrays["fooled"],
            arrays["images"],
        )
        position += 1
