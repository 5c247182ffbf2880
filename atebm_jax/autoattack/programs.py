"""What runs on a device: one batch through an attack, or through the network alone.

Each function is compiled once for a network, an attack and a shape of batch. The
network is a pytree: the weights of a `jax.tree_util.Partial(model.apply, variables)`
are arguments of the programs. What any other function closes over becomes a constant
in each of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from atebm_jax import losses
from atebm_jax.autoattack import apgd, balls, fab, objectives, square
from atebm_jax.autoattack.apgd import ModelFn
from atebm_jax.autoattack.balls import per_image
from atebm_jax.autoattack.versions import ATTACKS, Plan, Settings

# The pass before the attacks.
CLEAN = "clean"
# Parts of the key; those below are the places of the attacks in `ATTACKS`.
_CLEAN_KEY, _PROBE_KEY = 1001, 1002


class Program(NamedTuple):
    """What is compiled in, beside the network."""

    stochastic: bool  #: whether the network takes a key
    attack: str = CLEAN  #: a key of `ATTACKS`, or "clean" for none
    norm: str = ""  #: of an attack, a key of `balls.LENGTHS`
    settings: Settings = Settings()


def planned(plan: Plan, attack: str, stochastic: bool = False) -> Program:
    """The program of an attack of a plan, or of "clean"."""
    if attack == CLEAN:
        return Program(stochastic)
    settings = plan.settings.heeded_by(attack)
    return Program(stochastic, attack, plan.norm, settings)


class Batch(NamedTuple):
    """What a program is called with."""

    images: jax.Array  #: [B, H, W, C] float32 in [0, 1]
    labels: jax.Array  #: [B] int32
    indices: jax.Array  #: [B] int32, places in the data set, for random numbers
    epsilon: jax.Array  #: [] float32, radius
    number: jax.Array  #: [] int32, of the round
    key: jax.Array  #: [] random key of the whole run


class Probe(NamedTuple):
    """Two passes and a gradient at some images, on a device or as NumPy arrays."""

    logits: Any  #: [B, K] of one pass
    again: Any  #: [B, K] of another, with another key
    flat: Any  #: [B] bool, the gradient of the cross-entropy is zero everywhere


@partial(jax.jit, static_argnames="program")
def attack(
    program: Program, network: jax.tree_util.Partial, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """One round of an attack on a batch.

    Args:
      program: which attack.
      network: images, and a key if it is stochastic, to logits.
      batch: what to attack.

    Returns:
      Images [B, H, W, C] and whether each is misclassified, [B] bool, as a pass of its
      own over the final images finds. Images that are not come back unchanged.
    """
    model = _model(network, program.stochastic)
    if program.attack == CLEAN:
        found, key_check = batch.images, jax.random.fold_in(batch.key, _CLEAN_KEY)
    else:
        key = jax.random.fold_in(batch.key, tuple(ATTACKS).index(program.attack))
        key = jax.random.fold_in(key, batch.number)
        key, key_check = jax.random.split(key)
        search = _FAMILIES[ATTACKS[program.attack].family]
        found = search(program, model, batch, key)
    wrong = model(found, key_check).argmax(axis=-1) != batch.labels
    return jnp.where(per_image(wrong), found, batch.images), wrong


@partial(jax.jit, static_argnames="program")
def probe(program: Program, network: jax.tree_util.Partial, batch: Batch) -> Probe:
    """Takes a probe of the network; arguments as of `attack`."""
    model = _model(network, program.stochastic)
    keys = jax.random.split(jax.random.fold_in(batch.key, _PROBE_KEY))

    def loss(x: jax.Array) -> jax.Array:
        return losses.cross_entropy(model(x, keys[0]), batch.labels).sum()

    flat = jnp.all(jax.grad(loss)(batch.images) == 0, axis=(1, 2, 3))
    return Probe(model(batch.images, keys[0]), model(batch.images, keys[1]), flat)


def _model(network: jax.tree_util.Partial, stochastic: bool) -> ModelFn:
    def model(x: jax.Array, key: jax.Array) -> jax.Array:
        logits = network(x, key) if stochastic else network(x)
        return logits.astype(jnp.float32)

    return model


def _apgd(program: Program, model: ModelFn, batch: Batch, key: jax.Array) -> jax.Array:
    attack, settings = ATTACKS[program.attack], program.settings
    targets = _ranked(model, batch, key) if attack.targeted else None

    def loss(logits: jax.Array) -> jax.Array:
        return objectives.loss(attack.objective, logits, batch.labels, targets)

    evaluate = apgd.evaluator(model, loss, batch.labels, settings.gradient_samples)
    keys = balls.image_keys(key, batch.indices)
    search: Callable[..., apgd.State] = partial(apgd.search, norm=program.norm)
    radius = batch.epsilon
    if program.norm == "l1" and settings.wide_ball:
        search, radius = apgd.search_from_wide_ball, 3 * batch.epsilon
    start = balls.random_start(keys, batch.images, radius, program.norm)
    steps = settings.num_steps
    state = search(evaluate, key, batch.images, start, batch.epsilon, steps)
    return state.adversarial


def _fab(program: Program, model: ModelFn, batch: Batch, key: jax.Array) -> jax.Array:
    images, labels, norm = batch.images, batch.labels, program.norm
    if ATTACKS[program.attack].targeted:
        targets = _ranked(model, batch, key)
        boundary = fab.targeted_boundary(model, key, labels, targets)
        start = images
    else:
        boundary = fab.nearest_boundary(model, key, labels, norm)
        # Restarts after the first begin half way to the surface of the ball.
        keys = balls.image_keys(key, batch.indices)
        drawn = balls.random_start(keys, images, 0.5 * batch.epsilon, norm)
        start = jnp.where(batch.number > 0, drawn, images)

    def correct(x: jax.Array) -> jax.Array:
        return model(x, key).argmax(axis=-1) == labels

    steps = jnp.int32(program.settings.num_steps)
    state = fab.search(boundary, correct, images, start, steps, norm=norm)
    near = per_image(state.distance <= batch.epsilon)
    return jnp.where(near, state.nearest, images)


def _square(
    program: Program, model: ModelFn, batch: Batch, key: jax.Array
) -> jax.Array:
    return square.search(
        model,
        key,
        balls.image_keys(key, batch.indices),
        batch.images,
        batch.labels,
        batch.epsilon,
        jnp.int32(program.settings.num_queries),
        norm=program.norm,
    ).best


_FAMILIES = {"apgd": _apgd, "fab": _fab, "square": _square}


def _ranked(model: ModelFn, batch: Batch, key: jax.Array) -> jax.Array:
    """The class of rank `batch.number` of every clean image, 0 the most likely."""
    order = jnp.argsort(model(batch.images, key), axis=-1)
    place = jnp.broadcast_to(order.shape[-1] - 1 - batch.number, batch.labels.shape)
    return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0]
