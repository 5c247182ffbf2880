"""Auto-PGD (Croce and Hein, 2020), and its L1 form (Croce and Hein, 2021).

Gradient ascent with momentum inside a ball. At checkpoints, which come closer and
closer, an image's step is halved, and its search goes back to its best point, if too
few of the last steps raised the loss or if nothing improved on the best one.

The loop's state is one of arrays with the image first: images never see one another,
and nothing in the loop needs communication between devices.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from atebm_jax.autoattack import balls
from atebm_jax.autoattack.balls import per_image

# (images [B, H, W, C], key) -> logits [B, K]; the key is for randomised networks.
ModelFn = Callable[[jax.Array, jax.Array], jax.Array]
# Logits [B, K] -> losses [B], to be raised.
LossFn = Callable[[jax.Array], jax.Array]

_MOMENTUM = 0.75
_MIN_INCREASES = 0.75
# L1: share of pixels moved at first, and what the sparsity adapts.
_FIRST_SHARE = 0.2
_SHARE_DIVISOR = 1.5
_SPARSER = 0.95
_STEP_DIVISOR = 1.5
_SMALLEST_STEP = 0.1


class Schedule(NamedTuple):
    """When the checkpoints are; run-time values, each [] int32."""

    num_steps: jax.Array
    first_period: jax.Array
    shorter_by: jax.Array
    shortest_period: jax.Array


class State(NamedTuple):
    """The search after some steps. Images [B, H, W, C] float32, the rest [B].

    Attributes:
      x, previous: this and the last iterate.
      loss, gradient: at x.
      best, best_loss, best_gradient: where the loss was highest so far.
      adversarial: the last misclassified iterate; the start if there was none.
      robust: bool, all iterates were classified correctly.
      step_size: in pixels of the norm.
      increases: int32, steps since the checkpoint that raised the loss.
      halved: bool, the step was halved at the last checkpoint.
      checked_loss: best_loss at the last checkpoint.
      share: L1, share of the pixels that a step moves.
      moved: L1, pixels that differed from the image at the last checkpoint.
      iteration, period, next_check: [] int32.
    """

    x: jax.Array
    previous: jax.Array
    loss: jax.Array
    gradient: jax.Array
    best: jax.Array
    best_loss: jax.Array
    best_gradient: jax.Array
    adversarial: jax.Array
    robust: jax.Array
    step_size: jax.Array
    increases: jax.Array
    halved: jax.Array
    checked_loss: jax.Array
    share: jax.Array
    moved: jax.Array
    iteration: jax.Array
    period: jax.Array
    next_check: jax.Array


class Evaluation(NamedTuple):
    """Of some images: losses [B], their gradients [B, H, W, C], correct [B] bool."""

    loss: jax.Array
    gradient: jax.Array
    correct: jax.Array


EvaluateFn = Callable[[jax.Array, jax.Array], Evaluation]


def schedule(num_steps: int, norm: str) -> Schedule:
    """Checkpoints of a run of `num_steps`: periods from 22 % down to 6 % of it.

    For L1 the period is 4 % throughout.
    """
    if norm == "l1":
        first = shortest = max(int(0.04 * num_steps), 1)
        shorter = 0
    else:
        first = max(int(0.22 * num_steps), 1)
        shorter = max(int(0.03 * num_steps), 1)
        shortest = max(int(0.06 * num_steps), 1)
    return Schedule(*map(jnp.int32, (num_steps, first, shorter, shortest)))


def evaluator(
    model: ModelFn, loss_fn: LossFn, labels: jax.Array, num_samples: int = 1
) -> EvaluateFn:
    """Losses, gradients and correctness of images, from one forward pass.

    Args:
      model: images and key to logits.
      loss_fn: logits [B, K] -> losses [B].
      labels: [B] int.
      num_samples: gradients are means over so many passes (expectation over the
        network's randomness); loss and correctness are those of the last pass.
    """

    def once(x: jax.Array, key: jax.Array) -> Evaluation:
        def total(x: jax.Array):
            logits = model(x, key)
            values = loss_fn(logits)
            return values.sum(), (values, logits)

        gradient, (values, logits) = jax.grad(total, has_aux=True)(x)
        return Evaluation(values, gradient, logits.argmax(axis=-1) == labels)

    def evaluate(x: jax.Array, key: jax.Array) -> Evaluation:
        if num_samples == 1:
            return once(x, key)

        def add(index: jax.Array, done: Evaluation) -> Evaluation:
            new = once(x, jax.random.fold_in(key, index))
            return new._replace(gradient=done.gradient + new.gradient)

        first = once(x, jax.random.fold_in(key, 0))
        result = jax.lax.fori_loop(1, num_samples, add, first)
        return result._replace(gradient=result.gradient / num_samples)

    return evaluate


def init(
    evaluate: EvaluateFn,
    key: jax.Array,
    images: jax.Array,
    start: jax.Array,
    epsilon: jax.Array,
    plan: Schedule,
    *,
    norm: str,
    random: bool,
) -> State:
    """The search before its first step.

    Args:
      evaluate: as of `evaluator`.
      key: for randomised networks.
      images: [B, H, W, C] in [0, 1], the centres of the balls.
      start: [B, H, W, C] first iterate, inside the ball.
      epsilon: [] radius >= 0.
      plan: as of `schedule`.
      norm: "linf", "l2" or "l1".
      random: the start was drawn; an L1 search that goes on from a found point takes
        its sparsity from that point instead.
    """
    first = evaluate(start, key)
    ones = jnp.ones_like(first.loss)
    moved = ones * balls.num_pixels(images)
    share = ones * _FIRST_SHARE
    if norm == "l1" and not random:
        moved = _count_moved(start, images)
        share = moved / balls.num_pixels(images) / _SHARE_DIVISOR
    return State(
        x=start,
        previous=start,
        # Steps are counted against the loss of the step before, the first one
        # against zero: that is what published figures rest on.
        loss=jnp.zeros_like(first.loss),
        gradient=first.gradient,
        best=start,
        best_loss=first.loss,
        best_gradient=first.gradient,
        adversarial=start,
        robust=first.correct,
        step_size=ones * epsilon * (1.0 if norm == "l1" else 2.0),
        increases=jnp.zeros(first.loss.shape, jnp.int32),
        halved=jnp.ones_like(first.correct),
        checked_loss=first.loss,
        share=share,
        moved=moved,
        iteration=jnp.int32(0),
        period=plan.first_period,
        next_check=plan.first_period,
    )


def step(
    evaluate: EvaluateFn,
    key: jax.Array,
    images: jax.Array,
    epsilon: jax.Array,
    plan: Schedule,
    state: State,
    *,
    norm: str,
) -> State:
    """One step of every image's search, with its checkpoint where one is due."""
    x = _propose(images, epsilon, state, norm)
    new = evaluate(x, key)
    better = new.loss > state.best_loss
    mask = per_image(better)
    state = state._replace(
        x=x,
        previous=state.x,
        loss=new.loss,
        gradient=new.gradient,
        best=jnp.where(mask, x, state.best),
        best_loss=jnp.where(better, new.loss, state.best_loss),
        best_gradient=jnp.where(mask, new.gradient, state.best_gradient),
        adversarial=jnp.where(per_image(new.correct), state.adversarial, x),
        robust=state.robust & new.correct,
        increases=state.increases + (new.loss > state.loss).astype(jnp.int32),
        iteration=state.iteration + 1,
    )
    check = _check_l1 if norm == "l1" else _check
    return jax.lax.cond(
        state.iteration == state.next_check,
        lambda s: check(images, epsilon, plan, s),
        lambda s: s,
        state,
    )


def search(
    evaluate: EvaluateFn,
    key: jax.Array,
    images: jax.Array,
    start: jax.Array,
    epsilon: jax.Array,
    plan: Schedule,
    *,
    norm: str,
    random: bool,
) -> State:
    """`plan.num_steps` steps from a start; arguments as of `init`."""
    key_start, key_steps = jax.random.split(key)
    state = init(
        evaluate, key_start, images, start, epsilon, plan, norm=norm, random=random
    )

    def body(index: jax.Array, state: State) -> State:
        key = jax.random.fold_in(key_steps, index)
        return step(evaluate, key, images, epsilon, plan, state, norm=norm)

    return jax.lax.fori_loop(0, plan.num_steps, body, state)


def search_from_wide_ball(
    evaluate: EvaluateFn,
    key: jax.Array,
    images: jax.Array,
    start: jax.Array,
    epsilon: jax.Array,
    num_steps: int,
) -> State:
    """L1 search in balls of radius 3, 2 and 1 epsilon (Croce and Hein, 2021).

    30, 30 and 40 % of the steps; each ball begins at the projection of the best point
    of the one before. `start` must lie in the widest.
    """
    early = math.ceil(0.3 * num_steps)
    late = max(num_steps - 2 * early, 0)
    for index, (wide, steps) in enumerate(((3, early), (2, early), (1, late))):
        radius = epsilon * wide
        state = search(
            evaluate,
            jax.random.fold_in(key, index),
            images,
            balls.onto(start, images, radius, "l1"),
            radius,
            schedule(steps, "l1"),
            norm="l1",
            random=False,
        )
        start = state.best
    return state


def _propose(
    images: jax.Array, epsilon: jax.Array, state: State, norm: str
) -> jax.Array:
    size = per_image(state.step_size)
    if norm == "l1":
        return balls.onto(
            state.x + size * _sparse_direction(state), images, epsilon, norm
        )
    direction = (
        jnp.sign(state.gradient)
        if norm == "linf"
        else balls.scaled_to(state.gradient, jnp.float32(1), norm)
    )
    plain = balls.onto(state.x + size * direction, images, epsilon, norm)
    weight = jnp.where(state.iteration > 0, _MOMENTUM, 1.0)
    mixed = weight * (plain - state.x) + (1.0 - weight) * (state.x - state.previous)
    return balls.onto(state.x + mixed, images, epsilon, norm)


def _check(
    images: jax.Array, epsilon: jax.Array, plan: Schedule, state: State
) -> State:
    """Halves steps and sends their images back to their best points."""
    del images, epsilon
    enough = _MIN_INCREASES * state.period.astype(jnp.float32)
    oscillates = state.increases.astype(jnp.float32) <= enough
    stands = ~state.halved & (state.best_loss <= state.checked_loss)
    halve = oscillates | stands
    period = jnp.maximum(state.period - plan.shorter_by, plan.shortest_period)
    return _go_back(state, halve)._replace(
        step_size=jnp.where(halve, 0.5 * state.step_size, state.step_size),
        increases=jnp.zeros_like(state.increases),
        halved=halve,
        checked_loss=state.best_loss,
        period=period,
        next_check=state.next_check + period,
    )


def _check_l1(
    images: jax.Array, epsilon: jax.Array, plan: Schedule, state: State
) -> State:
    """Adapts the sparsity; images that became sparser begin anew with long steps."""
    del plan
    moved = _count_moved(state.x, images)
    sparser = moved < _SPARSER * state.moved
    shorter = jnp.clip(
        state.step_size / _STEP_DIVISOR, _SMALLEST_STEP * epsilon, epsilon
    )
    return _go_back(state, sparser)._replace(
        step_size=jnp.where(sparser, epsilon, shorter),
        share=moved / balls.num_pixels(images) / _SHARE_DIVISOR,
        moved=moved,
        next_check=state.next_check + state.period,
    )


def _go_back(state: State, mask: jax.Array) -> State:
    where = per_image(mask)
    return state._replace(
        x=jnp.where(where, state.best, state.x),
        gradient=jnp.where(where, state.best_gradient, state.gradient),
    )


def _count_moved(x: jax.Array, images: jax.Array) -> jax.Array:
    return (x != images).sum(axis=(1, 2, 3)).astype(x.dtype)


def _sparse_direction(state: State) -> jax.Array:
    """Signs of the largest gradients, divided by their number: L1 length one."""
    size = jnp.abs(state.gradient)
    ranked = jnp.sort(size.reshape(size.shape[0], -1), axis=-1)
    count = ranked.shape[-1]
    index = ((1.0 - state.share) * count).astype(jnp.int32)
    index = jnp.clip(index, 0, count - 1)
    least = jnp.take_along_axis(ranked, index[:, None], axis=-1)[:, 0]
    chosen = jnp.where(size >= per_image(least), jnp.sign(state.gradient), 0.0)
    return chosen / per_image(balls.l1_length(chosen) + 1e-10)
