"""Robust accuracy under AutoAttack (method: section 6), resumable."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from atebm_jax import autoattack, metrics, models, sharding
from atebm_jax.errors import UserError
from atebm_jax.evaluate.context import Context, figure
from atebm_jax.evaluate.store import Store


def run(context: Context, out: epath.Path) -> dict[str, Any]:
    """Robust accuracy after each attack of the ensemble, as the original counts it.

    Every finished batch is stored; `autoattack.npz` holds the adversarial images where
    they are asked for.

    Raises:
      UserError: several processes, or a threat or version that there is not.
    """
    if jax.process_count() > 1:
        raise UserError(
            "autoattack runs in one process, on all its devices: start a single one, "
            "or leave autoattack out of --metrics."
        )
    options, default = context.options, context.config.evaluate.attack
    norm = default.norm if options.norm is None else options.norm
    epsilon = float(default.epsilon if options.epsilon is None else options.epsilon)
    rows = context.images("test")
    store = context.store.within(
        part="autoattack",
        source=context.sources["test"].spec,
        norm=norm,
        epsilon=epsilon,
        version=options.version,
    )
    units = list(_stored(store))
    position = len(units)

    def save(unit: autoattack.Unit) -> None:
        nonlocal position
        store.save(f"{position:06d}", unit._asdict())
        position += 1

    result = autoattack.run(
        jax.random.key(options.seed),
        models.logits_fn(context.model, context.variables),
        rows["bytes"].astype(np.float32) / np.float32(255),
        rows["labels"],
        threat=(norm, epsilon),
        version=options.version,
        batch_size=context.config.evaluate.batch_size,
        sharding=sharding.batched(context.mesh),
        done=units,
        on_unit=save,
        on_progress=lambda p: context.show(f"AutoAttack {p.attack}", p.done, p.of),
    )
    if options.save_adversarial:
        _save_images(out / "autoattack.npz", result, rows["labels"])
    total = len(result.clean)
    masks = {"clean": result.clean} | result.robust
    return {
        "protocol": {
            "attack": f"AutoAttack {options.version} (native)",
            "norm": norm,
            "epsilon": epsilon,
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


def _save_images(
    path: epath.Path, result: autoattack.Result, labels: np.ndarray
) -> None:
    temporary = path.parent / f".{path.name}.tmp"
    with temporary.open("wb") as file:
        np.savez_compressed(file, images=result.adversarial, labels=labels)
    temporary.replace(path)
