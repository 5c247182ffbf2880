"""Samples of the model in resumable units, as features of an extractor."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atebm_jax import ascent, data, energy, models, sampling, sharding
from atebm_jax.errors import UserError
from atebm_jax.evaluate.context import Context
from atebm_jax.evaluate.extractors import Extractor, score_inputs
from atebm_jax.evaluate.store import Arrays

# How floats become bytes: as the published scores were made, or without their bias.
QUANTISE: dict[str, Callable[[Any], jax.Array]] = {
    "reference": lambda x: jnp.floor(x * 255.0).astype(jnp.uint8),
    "nearest": lambda x: jnp.round(x * 255.0).astype(jnp.uint8),
}


# [B, H, W, C] float32 in [0, 1] on the devices; [B] bool, which stand in for another.
Seeds = tuple[jax.Array, np.ndarray]


class Plan(NamedTuple):
    """What to draw.

    Attributes:
      name: of the part, for progress.
      number: images.
      steps: numbers of sampling steps at which features are taken, consecutive.
      score_protocol: of the Inception Score; "" where no logits are needed.
      num_shown: images whose bytes are kept.
    """

    name: str
    number: int
    steps: range
    score_protocol: str = ""
    num_shown: int = 0


def check_sampler(text: str) -> None:
    """Refuses what is no sampler, or not with these settings.

    Raises:
      UserError: names the field of the config, and what there is.
    """
    try:
        ascent.rule(text)
    except UserError as error:
        raise UserError(f"config.evaluate.samples.sampler: {error}") from error


def units(context: Context, extractor: Extractor, plan: Plan) -> Iterator[Arrays]:
    """Units of samples in order; those that are on disk are read.

    Labels run 0..K-1 cyclically; image i depends on the seed and i alone.

    Yields:
      "features" [B, R, D] for R numbers of steps; "logits" [B, K'] and "bytes"
      [B, H, W, C] uint8 (empty beyond those to be shown) after the last of them;
      "stand_in" [B] bool, whose seed is the next image, as its own cannot be decoded.
    """
    size = context.config.evaluate.batch_size
    total = -(-plan.number // size)
    settings = context.config.evaluate.samples
    store = context.store.within(
        part="samples",
        seeds=context.config.data.seeds,
        content=context.fingerprints.get("seeds", ""),
        extractor=extractor.fingerprint,
        sampler=ascent.resolved(settings.sampler),
        step_size=settings.step_size,
        steps=list(plan.steps),
        quantise=context.options.quantise,
        score_protocol=plan.score_protocol,
        num_shown=plan.num_shown,
        undecodable_seeds="the next image",
    )
    seeds: Iterator[Seeds] = iter(())
    position, draw = -1, None
    for index in range(total):
        unit = store.load(f"{index:06d}")
        if unit is None:
            draw = draw or _drawer(context, extractor, plan)
            if position != index:
                seeds, position = _seeds(context, index), index
            images, stand_in = next(seeds)
            unit = draw(images, index * size) | {"stand_in": stand_in}
            store.save(f"{index:06d}", unit)
            position += 1
        context.show(plan.name, index + 1, total)
        left = plan.number - index * size
        yield {key: rows[:left] for key, rows in unit.items()}


def _drawer(
    context: Context, extractor: Extractor, plan: Plan
) -> Callable[[jax.Array, int], Arrays]:
    everywhere = sharding.replicated(context.mesh)
    sample = jax.jit(_sampler(context, extractor, plan.steps), out_shardings=everywhere)
    again = plan.score_protocol == "reference" and extractor.apply_inputs is not None
    classify = extractor.apply_inputs and jax.jit(
        extractor.apply_inputs, out_shardings=everywhere
    )

    def draw(seeds: jax.Array, first: int) -> Arrays:
        made = sample(context.variables, extractor.variables, seeds, np.int32(first))
        unit = {key: np.asarray(value) for key, value in made.items()}
        if again and classify is not None:
            inputs = _split(score_inputs(unit["bytes"]), context)
            logits = classify(extractor.variables, inputs)
            unit["logits"] = np.asarray(logits)
        if not plan.score_protocol:
            del unit["logits"]
        unit["bytes"] = unit["bytes"][: max(plan.num_shown - first, 0)]
        return unit

    return draw


def _sampler(
    context: Context, extractor: Extractor, steps: range
) -> Callable[..., dict[str, jax.Array]]:
    size, settings = context.config.evaluate.batch_size, context.config.evaluate.samples
    quantise = QUANTISE[context.options.quantise]
    rule, seed = ascent.rule(settings.sampler), context.options.seed

    def sample(
        variables: Any, weights: Any, seeds: jax.Array, first: jax.Array
    ) -> dict[str, jax.Array]:
        numbers = first + jnp.arange(size, dtype=jnp.int32)
        labels = numbers % context.config.model.num_classes
        keys = sampling.step_keys(jax.random.key(seed), numbers)
        logits_fn = models.logits_fn(context.model, variables)

        # One trajectory passes through every number of steps.
        def advance(
            carry: tuple[jax.Array, Any], last: jax.Array
        ) -> tuple[tuple[jax.Array, Any], dict[str, jax.Array]]:
            done, state = carry
            state = ascent.proceed(
                lambda x: energy.score(logits_fn(x), labels),
                state,
                rule,
                keys=keys,
                first=done,
                last=last,
                step_size=settings.step_size,
            )
            levels = quantise(state.images)
            images = levels.astype(jnp.float32) / 255.0
            features, logits = extractor.apply(weights, images)
            made = {"features": features, "logits": logits, "bytes": levels}
            return (last, state), made

        start = (jnp.int32(0), ascent.begin(rule, seeds))
        ends = jnp.asarray(np.asarray(steps, np.int32))
        _, rows = jax.lax.scan(advance, start, ends)
        features = jnp.swapaxes(rows.pop("features"), 0, 1)
        return {"features": features} | {key: value[-1] for key, value in rows.items()}

    return sample


def _seeds(context: Context, start: int) -> Iterator[Seeds]:
    """Batches of seeds from the one of that number."""
    size, spec = context.config.evaluate.batch_size, context.config.data.seeds
    if spec == "noise":
        key = jax.random.key(context.options.seed)
        split = sharding.batched(context.mesh)

        def noise(first: jax.Array) -> jax.Array:
            indices = first + jnp.arange(size, dtype=jnp.int32)
            return sampling.noise_seeds(key, indices, context.image_shape)

        compiled = jax.jit(noise, out_shardings=split)
        for index in itertools.count(start):
            yield compiled(np.int32(index * size)), np.zeros(size, bool)
    if context.gaussian is not None:
        for index in itertools.count(start):
            numbers = np.arange(index * size, (index + 1) * size)
            labels = numbers % context.config.model.num_classes
            drawn = context.gaussian.batch(context.options.seed, numbers, labels)
            yield _split(drawn, context), np.zeros(size, bool)
    source = context.sources["seeds"]
    rounds = len(source) // size
    if rounds == 0:
        images, stand_in = _few_seeds(context)
        while True:
            yield _split(images, context), stand_in
    everywhere = sharding.replicated(context.mesh)
    whole = jax.jit(lambda mask: ~mask, out_shardings=everywhere)
    for index in itertools.count(start // rounds):
        first = start % rounds if index == start // rounds else 0
        for batch in context.batches("seeds", rounds * size, first, next_if_bad=True):
            fields = {key: batch[key] for key in ("images", "mask")}
            placed = sharding.put_batch(fields, context.mesh)
            seeds = placed["images"].astype(jnp.float32) / 255.0
            yield seeds, np.asarray(whole(placed["mask"]))


def _few_seeds(context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Fewer seeds than a batch has places: over and over."""
    images, stand_in = data.seed_images(
        context.sources["seeds"],
        context.preprocess("seeds"),
        context.image_shape,
        None,
        context.config.data.max_bad_images,
    )
    rows = np.arange(context.config.evaluate.batch_size) % len(images)
    return images[rows].astype(np.float32) / np.float32(255), stand_in[rows]


def _split(array: np.ndarray, context: Context) -> jax.Array:
    """A batch that every process holds, split over the devices."""
    target = sharding.batched(context.mesh)
    return jax.make_array_from_callback(array.shape, target, lambda at: array[at])
