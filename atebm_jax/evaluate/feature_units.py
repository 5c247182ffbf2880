"""Samples of the model in resumable units, as features of an extractor."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atebm_jax import drawing, recipes, seeds
from atebm_jax.evaluate.context import Context
from atebm_jax.evaluate.extractors import Extractor, score_inputs
from atebm_jax.evaluate.store import Arrays


class Plan(NamedTuple):
    """What to draw."""

    name: str  #: of the part, for progress
    number: int  #: images
    ends: range  #: numbers of sampling steps at which features are taken
    score_protocol: str = ""  #: of the Inception Score; "" if no logits are needed
    num_shown: int = 0  #: images whose bytes are kept


def draw(context: Context, extractor: Extractor, plan: Plan) -> Iterator[Arrays]:
    """Units of samples in order, a chunk each; those that are on disk are read.

    Labels run 0..K-1 cyclically; image i depends on the seed and i alone.

    Yields:
      "features" [B, S, D] for S numbers of steps; "logits" [B, K'] and "bytes"
      [B, H, W, C] uint8 (empty beyond those to be shown) after the last of them;
      "stand_in" [B] bool, whose seed is the next image, as its own cannot be decoded.
    """
    recipe = recipes.of_config(context.config.evaluate.samples)
    store = context.store.within(
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
    done, total = 0, drawing.num_chunks(plan.number)
    for unit in itertools.islice(store.units(), total):
        yield _cut(unit, plan.number - done * drawing.CHUNK)
        done += 1
        context.show(plan.name, done, total)
    for index, unit in _drawn(context, extractor, plan, done, total):
        unit["bytes"] = unit["bytes"][: max(plan.num_shown - index * drawing.CHUNK, 0)]
        store.save(index, unit)
        context.show(plan.name, index + 1, total)
        yield _cut(unit, plan.number - index * drawing.CHUNK)


def _cut(unit: Arrays, left: int) -> Arrays:
    return {key: rows[:left] for key, rows in unit.items()}


def _drawn(
    context: Context, extractor: Extractor, plan: Plan, done: int, total: int
) -> Iterator[tuple[int, Arrays]]:
    """(number, unit) of the chunks after `done`, drawn by all processes together."""
    if done == total:
        return
    seed = context.options.seed
    seeds_of = context.seeds_fn(seed)
    quantise = recipes.QUANTISE[context.options.quantise]
    apply = extractor.apply  # cached programs would keep the extractor's weights
    again = extractor.apply_inputs if plan.score_protocol == "reference" else None
    classify = None if again is None else jax.jit(again)

    def read(weights: Any, images: jax.Array) -> dict[str, jax.Array]:
        levels = quantise(images)

        def extract(one: jax.Array) -> tuple[jax.Array, jax.Array]:
            return apply(weights, one.astype(jnp.float32) / 255.0)

        features, logits = jax.lax.map(extract, levels)
        made = {"features": jnp.swapaxes(features, 0, 1), "bytes": levels[-1]}
        return made | ({"logits": logits[-1]} if plan.score_protocol else {})

    def finish(shown: bool, indices: np.ndarray, made: Arrays, weights: Any) -> Arrays:
        if classify is not None:
            inputs = score_inputs(made["bytes"])
            made["logits"] = np.asarray(classify(weights[1], inputs))
        if not shown:
            made["bytes"] = made["bytes"][:0]
        stand_ins = list(seeds.stand_ins(seeds_of))
        return made | {"stand_in": np.isin(indices, stand_ins)}

    # Processes exchange arrays of one shape: leave out bytes that are not shown.
    end = min(max(drawing.num_chunks(plan.num_shown), done), total)
    for shown, part in {True: range(done, end), False: range(end, total)}.items():
        yield from drawing.draw(
            context.model,
            context.variables,
            recipes.of_config(context.config.evaluate.samples, seed=seed),
            part,
            drawing.cyclic_labels(context.config.model.num_classes),
            seeds_of,
            ends=plan.ends,
            read=read,
            read_weights=extractor.variables,
            finish=functools.partial(finish, shown),
            together=True,
        )
