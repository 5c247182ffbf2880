"""Clean accuracy and accuracy under PGD (method: section 6, the quick check)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from atebm_jax import attacks, metrics, models, sharding

CountFn = Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]]


def make_counter(
    model: nn.Module, attack: ml_collections.ConfigDict, mesh: Mesh
) -> CountFn:
    """Compiles the count of images that stay correct.

    Args:
      model: images to logits.
      attack: `config.evaluate.attack`; an image is robust if it is classified
        correctly both as it is and after the attack.
      mesh: where batches live.

    Returns:
      (variables, {"images" uint8 [B, H, W, C], "labels" [B], "mask" [B]}) -> counts
      {"num", "clean", "robust"}, [] int32.
    """
    adversary = attacks.adversary(**attack)

    def count(variables: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        logits_fn = models.logits_fn(model, variables)
        images = batch["images"].astype(jnp.float32) / 255.0
        clean = metrics.accuracy(logits_fn(images), batch["labels"]) & batch["mask"]
        attacked = adversary(logits_fn, images, batch["labels"])
        robust = clean & metrics.accuracy(logits_fn(attacked), batch["labels"])
        return {
            name: values.sum(dtype=jnp.int32)
            for name, values in (
                ("num", batch["mask"]),
                ("clean", clean),
                ("robust", robust),
            )
        }

    return jax.jit(count, out_shardings=sharding.replicated(mesh))


def accuracy(
    count: CountFn,
    variables: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Counts over a data set.

    Args:
      count: as of `make_counter`.
      variables: the network, placed on every device.
      batches: this process's part, as of `data.eval_batches`.
      mesh: where batches live.
      check_stop: called before every batch; raises where the job shall end.

    Returns:
      {"num_examples", "clean_accuracy", "robust_accuracy"}.
    """
    totals = {"num": 0, "clean": 0, "robust": 0}
    for batch in batches:
        check_stop()
        counts = count(variables, sharding.put_batch(batch, mesh))
        for name, value in counts.items():
            totals[name] += int(value)
    number = max(totals["num"], 1)
    return {
        "num_examples": totals["num"],
        "clean_accuracy": totals["clean"] / number,
        "robust_accuracy": totals["robust"] / number,
    }
