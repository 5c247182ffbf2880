"""Samples of the model in resumable units, as features of an extractor."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atebm_jax import drawing, recipes
from atebm_jax.evaluate.context import Context
from atebm_jax.evaluate.extractors import Extractor, score_inputs
from atebm_jax.evaluate.store import Arrays, Store


class Plan(NamedTuple):
    """What to draw.

    Attributes:
      name: of the part, for progress.
      number: images.
      ends: numbers of sampling steps at which features are taken, ascending.
      score_protocol: of the Inception Score; "" where no logits are needed.
      num_shown: images whose bytes are kept.
    """

    name: str
    number: int
    ends: range
    score_protocol: str = ""
    num_shown: int = 0


def draw(context: Context, extractor: Extractor, plan: Plan) -> Iterator[Arrays]:
    """Units of samples in order, a chunk each; those that are on disk are read.

    Labels run 0..K-1 cyclically; image i depends on the seed and i alone.

    Yields:
      "features" [B, S, D] for S numbers of steps; "logits" [B, K'] and "bytes"
      [B, H, W, C] uint8 (empty beyond those to be shown) after the last of them;
      "stand_in" [B] bool, whose seed is the next image, as its own cannot be decoded.
    """
    store, total = _store(context, extractor, plan), drawing.num_chunks(plan.number)
    done = 0
    while done < total and (unit := store.load(f"{done:06d}")) is not None:
        yield _cut(unit, plan.number - done * drawing.CHUNK)
        done += 1
        context.show(plan.name, done, total)
    if done == total:
        return
    for index, unit in _drawn(context, extractor, plan, range(done, total)):
        unit["bytes"] = unit["bytes"][: max(plan.num_shown - index * drawing.CHUNK, 0)]
        store.save(f"{index:06d}", unit)
        context.show(plan.name, index + 1, total)
        yield _cut(unit, plan.number - index * drawing.CHUNK)


def _cut(unit: Arrays, left: int) -> Arrays:
    return {key: rows[:left] for key, rows in unit.items()}


def _store(context: Context, extractor: Extractor, plan: Plan) -> Store:
    recipe = recipes.of_config(context.config.evaluate.samples)
    return context.store.within(
        part="samples",
        seeds=context.config.data.seeds,
        content=context.fingerprints.get("seeds", ""),
        extractor=extractor.fingerprint,
        sampler=recipe.sampler,
        step_size=recipe.step_size,
        steps=list(plan.ends),
        quantise=context.options.quantise,
        score_protocol=plan.score_protocol,
        num_shown=plan.num_shown,
        chunk=drawing.CHUNK,
    )


def _drawn(
    context: Context, extractor: Extractor, plan: Plan, numbers: range
) -> Iterator[tuple[int, Arrays]]:
    """(number, unit) of one chunk after the other, drawn by all processes together."""
    settings, options = context.config.data, context.options
    quantise = recipes.QUANTISE[options.quantise]
    seeds_of = drawing.seeds_fn(
        settings.seeds,
        options.seed,
        settings,
        gaussian=context.gaussian,
        source=context.sources.get("seeds"),
    )
    apply = extractor.apply  # not the extractor: programs are kept, weights are not
    again = extractor.apply_inputs if plan.score_protocol == "reference" else None
    classify = None if again is None else jax.jit(again)

    def read(weights: Any, images: jax.Array) -> dict[str, jax.Array]:
        levels = quantise(images)

        def extract(one: jax.Array) -> tuple[jax.Array, jax.Array]:
            return apply(weights, one.astype(jnp.float32) / 255.0)

        features, logits = jax.lax.map(extract, levels)
        made = {"features": jnp.swapaxes(features, 0, 1), "bytes": levels[-1]}
        return made | ({"logits": logits[-1]} if plan.score_protocol else {})

    def finish(indices: np.ndarray, made: Arrays, weights: Any) -> Arrays:
        if classify is not None:
            inputs = score_inputs(made["bytes"])
            made["logits"] = np.asarray(classify(weights[1], inputs))
        stand_ins = list(drawing.stand_ins(seeds_of))
        return made | {"stand_in": np.isin(indices, stand_ins)}

    def without_bytes(indices: np.ndarray, made: Arrays, weights: Any) -> Arrays:
        unit = finish(indices, made, weights)
        return unit | {"bytes": unit["bytes"][:0]}

    # Processes exchange arrays of one shape, and no bytes that nobody looks at.
    shown = max(drawing.num_chunks(plan.num_shown), numbers.start)
    parts = {finish: range(numbers.start, min(shown, numbers.stop))}
    parts[without_bytes] = range(min(shown, numbers.stop), numbers.stop)
    for kept, part in parts.items():
        yield from drawing.draw(
            context.model,
            context.variables,
            recipes.of_config(context.config.evaluate.samples, seed=options.seed),
            part,
            drawing.cyclic_labels(context.config.model.num_classes),
            seeds_of,
            ends=plan.ends,
            read=read,
            read_weights=extractor.variables,
            finish=kept,
            together=True,
        )
