"""Auto-PGD (Croce and Hein, 2020), and its L1 form (Croce and Hein, 2021).

Gradient ascent with momentum inside a ball. Checkpoints come closer and closer. At a
checkpoint, an image's step is halved and its search returns to its best point if too
few of the last steps raised the loss, or if nothing improved on the best point.

All arrays of the loop have the image first. Images never see one another, so nothing
in the loop needs communication between devices.
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


class State(NamedTuple):
    """The search after some steps. Images [B, H, W, C] float32, the rest [B]."""

    x: jax.Array  #: the last iterate
    previous: jax.Array  #: the one before
    loss: jax.Array  #: at x
    gradient: jax.Array  #: at x
    best: jax.Array  #: where the loss was highest so far
    best_loss: jax.Array
    best_gradient: jax.Array
    adversarial: jax.Array  #: the last misclassified iterate; else the start
    step_size: jax.Array  #: in pixels of the norm
    increases: jax.Array  #: int32, steps since the checkpoint that raised the loss
    halved: jax.Array  #: bool, the step was halved at the last checkpoint
    checked_loss: jax.Array  #: best_loss at the last checkpoint
    share: jax.Array  #: L1, share of the pixels that a step moves
    moved: jax.Array  #: L1, pixels unlike the image's at the last checkpoint
    iteration: jax.Array  #: [] int32
    period: jax.Array  #: [] int32, steps from the last checkpoint to the next
    next_check: jax.Array  #: [] int32


class Evaluation(NamedTuple):
    """What a pass tells about some images."""

    loss: jax.Array  #: [B]
    gradient: jax.Array  #: [B, H, W, C]
    correct: jax.Array  #: [B] bool


EvaluateFn = Callable[[jax.Array, jax.Array], Evaluation]


class _Problem(NamedTuple):
    """What stays the same in a search; arguments of `search`."""

    evaluate: EvaluateFn
    images: jax.Array
    epsilon: jax.Array
    num_steps: int
    norm: str

    def period(self, share: float) -> int:
        """A share of all steps, but one step at least."""
        return max(int(share * self.num_steps), 1)


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
        def total(x: jax.Array) -> tuple[jax.Array, tuple]:
            logits = model(x, key)
            values = loss_fn(logits)
            return values.sum(), (values, logits)

        gradient, (values, logits) = jax.grad(total, has_aux=True)(x)
        return Evaluation(values, gradient, logits.argmax(axis=-1) == labels)

    def mean(x: jax.Array, key: jax.Array) -> Evaluation:
        def add(index: jax.Array, done: Evaluation) -> Evaluation:
            new = once(x, jax.random.fold_in(key, index))
            return new._replace(gradient=done.gradient + new.gradient)

        first = once(x, jax.random.fold_in(key, 0))
        result = jax.lax.fori_loop(1, num_samples, add, first)
        return result._replace(gradient=result.gradient / num_samples)

    return once if num_samples == 1 else mean


def search(
    evaluate: EvaluateFn,
    key: jax.Array,
    images: jax.Array,
    start: jax.Array,
    epsilon: jax.Array,
    num_steps: int,
    *,
    norm: str,
    share_of_start: bool = False,
) -> State:
    """Raises the loss from a start.

    Args:
      evaluate: as of `evaluator`.
      key: for randomised networks.
      images: [B, H, W, C] in [0, 1], the centres of the balls.
      start: [B, H, W, C] first iterate, inside the ball.
      epsilon: [] radius >= 0.
      num_steps: how many, >= 0.
      norm: "linf", "l2" or "l1".
      share_of_start: L1: the first steps move as many pixels as the start differs in,
        not a fixed share of all.
    """
    problem = _Problem(evaluate, images, epsilon, num_steps, norm)
    key_start, key_steps = jax.random.split(key)
    first = evaluate(start, key_start)

    def body(index: jax.Array, state: State) -> State:
        return _step(problem, jax.random.fold_in(key_steps, index), state)

    state = _begin(problem, start, first, share_of_start)
    return jax.lax.fori_loop(0, jnp.int32(num_steps), body, state)


def search_from_wide_ball(
    evaluate: EvaluateFn,
    key: jax.Array,
    images: jax.Array,
    start: jax.Array,
    epsilon: jax.Array,
    num_steps: int,
) -> State:
    """L1 search in balls of radius 3, 2 and 1 epsilon (Croce and Hein, 2021).

    30, 30 and 40 % of the steps. Each ball begins at the projection of the best point
    of the one before. Arguments as of `search`; `start` must lie in the widest ball.
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
            steps,
            norm="l1",
            share_of_start=True,
        )
        start = state.best
    return state


def _begin(
    problem: _Problem, start: jax.Array, first: Evaluation, share_of_start: bool
) -> State:
    """The search before its first step."""
    ones = jnp.ones_like(first.loss)
    pixels = math.prod(start.shape[1:])
    share, moved = ones * _FIRST_SHARE, ones * pixels
    period = jnp.int32(problem.period(0.04 if problem.norm == "l1" else 0.22))
    if share_of_start:
        moved = _count_moved(start, problem.images)
        share = moved / pixels / _SHARE_DIVISOR
    return State(
        x=start,
        previous=start,
        # Each step is counted against the loss of the step before, the first one
        # against zero. Published figures rest on that.
        loss=jnp.zeros_like(first.loss),
        gradient=first.gradient,
        best=start,
        best_loss=first.loss,
        best_gradient=first.gradient,
        adversarial=start,
        step_size=ones * problem.epsilon * (1.0 if problem.norm == "l1" else 2.0),
        increases=jnp.zeros(first.loss.shape, jnp.int32),
        halved=jnp.ones_like(first.correct),
        checked_loss=first.loss,
        share=share,
        moved=moved,
        iteration=jnp.int32(0),
        period=period,
        next_check=period,
    )


def _step(problem: _Problem, key: jax.Array, state: State) -> State:
    """One step of every image's search, with its checkpoint where one is due."""
    x = _propose(problem, state)
    new = problem.evaluate(x, key)
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
        increases=state.increases + (new.loss > state.loss).astype(jnp.int32),
        iteration=state.iteration + 1,
    )
    check = _check_l1 if problem.norm == "l1" else _check
    return jax.lax.cond(
        state.iteration == state.next_check,
        lambda s: check(problem, s),
        lambda s: s,
        state,
    )


def _propose(problem: _Problem, state: State) -> jax.Array:
    def onto(x: jax.Array) -> jax.Array:
        return balls.onto(x, problem.images, problem.epsilon, problem.norm)

    size = per_image(state.step_size)
    if problem.norm == "l1":
        return onto(state.x + size * _sparse_direction(state))
    direction = (
        jnp.sign(state.gradient)
        if problem.norm == "linf"
        else balls.scaled_to(state.gradient, jnp.float32(1), problem.norm)
    )
    plain = onto(state.x + size * direction)
    weight = jnp.where(state.iteration > 0, _MOMENTUM, 1.0)
    mixed = weight * (plain - state.x) + (1.0 - weight) * (state.x - state.previous)
    return onto(state.x + mixed)


def _check(problem: _Problem, state: State) -> State:
    """Halves steps and sends their images back to their best points.

    Periods fall from 22 % to 6 % of all steps, by 3 % each time.
    """
    enough = _MIN_INCREASES * state.period.astype(jnp.float32)
    oscillates = state.increases.astype(jnp.float32) <= enough
    stands = ~state.halved & (state.best_loss <= state.checked_loss)
    halve = oscillates | stands
    period = jnp.maximum(state.period - problem.period(0.03), problem.period(0.06))
    return _go_back(state, halve)._replace(
        step_size=jnp.where(halve, 0.5 * state.step_size, state.step_size),
        increases=jnp.zeros_like(state.increases),
        halved=halve,
        checked_loss=state.best_loss,
        period=period,
        next_check=state.next_check + period,
    )


def _check_l1(problem: _Problem, state: State) -> State:
    """Adapts the sparsity; images that became sparser begin anew with long steps.

    The period is 4 % of all steps throughout.
    """
    epsilon, moved = problem.epsilon, _count_moved(state.x, problem.images)
    sparser = moved < _SPARSER * state.moved
    shorter = jnp.clip(
        state.step_size / _STEP_DIVISOR, _SMALLEST_STEP * epsilon, epsilon
    )
    return _go_back(state, sparser)._replace(
        step_size=jnp.where(sparser, epsilon, shorter),
        share=moved / math.prod(state.x.shape[1:]) / _SHARE_DIVISOR,
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
    return chosen / per_image(balls.LENGTHS["l1"](chosen) + 1e-10)
