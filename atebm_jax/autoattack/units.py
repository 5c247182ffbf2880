"""Compiled programs: one an attack and batch shape, called batch by batch."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from atebm_jax.autoattack import apgd, balls, fab, objectives, square
from atebm_jax.autoattack.apgd import ModelFn
from atebm_jax.autoattack.balls import per_image
from atebm_jax.autoattack.versions import ATTACKS, Plan

# A part of the key for each attack, so that none depends on which others run.
_KEY_OF = {name: index for index, name in enumerate(ATTACKS)}


class Batch(NamedTuple):
    """What a program is called with.

    Attributes:
      images: [B, H, W, C] float32 in [0, 1].
      labels: [B] int32.
      indices: [B] int32, places in the data set; they decide the random numbers.
      number: [] int32, of the round.
      key: [] random key of the whole run.
    """

    images: jax.Array
    labels: jax.Array
    indices: jax.Array
    number: jax.Array
    key: jax.Array


# Batch -> (images [B, H, W, C], fooled [B] bool).
AttackFn = Callable[[Batch], tuple[jax.Array, jax.Array]]


def attack_function(name: str, plan: Plan, model: ModelFn) -> AttackFn:
    """An attack of the ensemble as one pure function of a batch.

    Args:
      name: a key of `ATTACKS`.
      plan: threat and settings.
      model: images and key to logits.

    Returns:
      A function to compile. Images that it does not fool come back unchanged.
      Whether one is fooled is decided by a pass of its own over the final images,
      all inside the ball.
    """
    make = _FAMILIES[ATTACKS[name].family]
    perturb = make(name, plan, model)

    def attack(batch: Batch) -> tuple[jax.Array, jax.Array]:
        key = jax.random.fold_in(batch.key, _KEY_OF[name])
        key = jax.random.fold_in(key, batch.number)
        key_attack, key_check = jax.random.split(key)
        found = perturb(batch, key_attack)
        wrong = model(found, key_check).argmax(axis=-1) != batch.labels
        return jnp.where(per_image(wrong), found, batch.images), wrong

    return attack


def _apgd(name: str, plan: Plan, model: ModelFn) -> Callable:
    targeted, settings, norm = ATTACKS[name].targeted, plan.settings, plan.norm
    epsilon, objective = jnp.float32(plan.epsilon), plan.objectives[name]

    def perturb(batch: Batch, key: jax.Array) -> jax.Array:
        if targeted:
            targets = _ranked(model, batch, key)
            ascended = objectives.TARGETED[objective]

            def loss(logits: jax.Array) -> jax.Array:
                return ascended(logits, batch.labels, targets)

        else:
            plain = objectives.UNTARGETED[objective]

            def loss(logits: jax.Array) -> jax.Array:
                return plain(logits, batch.labels)

        evaluate = apgd.evaluator(model, loss, batch.labels, settings.gradient_samples)
        keys = balls.image_keys(key, batch.indices)
        if norm == "l1" and settings.wide_ball:
            start = balls.random_start(keys, batch.images, 3 * epsilon, norm)
            state = apgd.search_from_wide_ball(
                evaluate, key, batch.images, start, epsilon, settings.num_steps
            )
        else:
            start = balls.random_start(keys, batch.images, epsilon, norm)
            state = apgd.search(
                evaluate,
                key,
                batch.images,
                start,
                epsilon,
                apgd.schedule(settings.num_steps, norm),
                norm=norm,
                random=True,
            )
        return state.adversarial

    return perturb


def _fab(name: str, plan: Plan, model: ModelFn) -> Callable:
    targeted, norm, epsilon = ATTACKS[name].targeted, plan.norm, plan.epsilon

    def perturb(batch: Batch, key: jax.Array) -> jax.Array:
        if targeted:
            targets = _ranked(model, batch, key)
            boundary = fab.targeted_boundary(model, key, batch.labels, targets)
            start = batch.images
        else:
            boundary = fab.nearest_boundary(model, key, batch.labels, norm)
            keys = balls.image_keys(key, batch.indices)
            drawn = fab.random_start(keys, batch.images, jnp.float32(epsilon), norm)
            start = jnp.where(batch.number > 0, drawn, batch.images)
        state = fab.search(
            boundary,
            lambda x: model(x, key).argmax(axis=-1) == batch.labels,
            batch.images,
            start,
            jnp.int32(plan.settings.num_steps),
            norm=norm,
        )
        near = per_image(state.distance <= epsilon)
        return jnp.where(near, state.nearest, batch.images)

    return perturb


def _square(name: str, plan: Plan, model: ModelFn) -> Callable:
    del name

    def perturb(batch: Batch, key: jax.Array) -> jax.Array:
        return square.search(
            model,
            key,
            balls.image_keys(key, batch.indices),
            batch.images,
            batch.labels,
            jnp.float32(plan.epsilon),
            jnp.int32(plan.settings.num_queries),
            norm=plan.norm,
        ).best

    return perturb


_FAMILIES = {"apgd": _apgd, "fab": _fab, "square": _square}


def _ranked(model: ModelFn, batch: Batch, key: jax.Array) -> jax.Array:
    """The class of rank `batch.number` of every clean image, 0 the most likely."""
    order = jnp.argsort(model(batch.images, key), axis=-1)
    place = jnp.broadcast_to(order.shape[-1] - 1 - batch.number, batch.labels.shape)
    return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0]


class Seconds:
    """Time spent compiling and running."""

    def __init__(self) -> None:
        self.compile = 0.0
        self.run = 0.0


class Programs:
    """Compiles functions of the network once a batch shape, and times them.

    The arrays that the network closes over are arguments of the programs, not
    constants in them: a large network would be copied into each.
    """

    def __init__(
        self,
        logits_fn: Callable[..., jax.Array],
        stochastic: bool,
        sharding: jax.sharding.NamedSharding | None,
    ):
        self._logits_fn, self._stochastic = logits_fn, stochastic
        self._sharding = sharding
        self._everywhere = sharding and jax.sharding.NamedSharding(
            sharding.mesh, jax.sharding.PartitionSpec()
        )
        self._networks: dict[tuple, tuple[Any, list]] = {}
        self._compiled: dict[tuple, Any] = {}
        self.seconds = Seconds()

    def call(self, name: str, make: Callable[[ModelFn], Callable], batch: Batch) -> Any:
        """Runs `make(model)` on a batch; compiles it where name or shape are new.

        Returns:
          Its results as NumPy arrays.
        """
        batch = self._place(batch)
        shape = (name, batch.images.shape)
        began = time.perf_counter()
        if shape not in self._compiled:
            self._compiled[shape] = self._compile(make, batch)
        ready = time.perf_counter()
        program, constants = self._compiled[shape]
        result = jax.tree.map(np.asarray, program(constants, batch))
        self.seconds.compile += ready - began
        self.seconds.run += time.perf_counter() - ready
        return result

    def _compile(self, make: Callable[[ModelFn], Callable], batch: Batch) -> Any:
        jaxpr, constants = self._network(batch)

        def program(constants: list, batch: Batch) -> Any:
            def model(x: jax.Array, key: jax.Array) -> jax.Array:
                values = (x, key) if self._stochastic else (x,)
                (logits,) = jaxpr_as_fun(ClosedJaxpr(jaxpr, constants))(*values)
                return logits.astype(jnp.float32)

            return make(model)(batch)

        # Every process needs every result.
        compiled = jax.jit(program, out_shardings=self._everywhere)
        return compiled.lower(constants, batch).compile(), constants

    def _network(self, batch: Batch) -> tuple[Any, list]:
        shape = batch.images.shape
        if shape not in self._networks:
            values = (batch.images, batch.key)[: 2 if self._stochastic else 1]
            closed = jax.make_jaxpr(self._logits_fn)(*values)
            constants = closed.consts
            if self._everywhere is not None:
                constants = jax.device_put(constants, self._everywhere)
            self._networks[shape] = (closed.jaxpr, constants)
        return self._networks[shape]

    def _place(self, batch: Batch) -> Batch:
        if self._sharding is None or self._everywhere is None:
            return jax.tree.map(jnp.asarray, batch)
        # Host arrays, of which each process looks at its own parts only: those of one
        # process cannot be put on devices of others.
        key = np.asarray(jax.random.key_data(batch.key))
        kind = jax.random.key_impl(batch.key)
        split, whole = self._sharding, self._everywhere
        return Batch(
            images=_global(batch.images, split),
            labels=_global(batch.labels, split),
            indices=_global(batch.indices, split),
            number=_global(batch.number, whole),
            key=jax.random.wrap_key_data(_global(key, whole), impl=kind),
        )


def _global(
    values: np.ndarray | jax.Array, sharding: jax.sharding.NamedSharding
) -> jax.Array:
    array = np.asarray(values)
    return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])
