"""Climb a score of the image: the one inner loop of the method.

    x <- P(move(x, g)),  g = the gradient of the score with respect to the image

A *rule* turns the gradient into a move, a *projection* P keeps the image where it may
be. The contrastive images of training, attacks, samples, counterfactuals and edits
differ in score, rule and projection, and in nothing else.

Nothing here knows a model. A score is any callable from images to numbers in which
every number depends on its own image only, so the loop needs no communication between
devices. It never differentiates through itself. Its trip count may be a traced int32,
so that one compilation serves every number of steps.

To add a rule, write one function here and name it in `RULES`. Command line, config and
API read its settings from its signature (`sgld(noise=0.005)`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atebm_jax import calls
from atebm_jax.errors import UserError

#: Images [B, H, W, C] -> scores [B], each of its own image only.
ObjectiveFn = Callable[[jax.Array], jax.Array]
#: Images [B, H, W, C] -> images that are allowed, [B, H, W, C].
ProjectFn = Callable[[jax.Array], jax.Array]
#: (step, from 0; number of steps), [] int32 each -> factor of the step size, [].
ScheduleFn = Callable[[jax.Array, jax.Array], jax.Array | float]
#: (gradients [B, H, W, C], memory) -> (where to go [B, H, W, C], memory).
UpdateFn = Callable[[jax.Array, Any], tuple[jax.Array, Any]]

# Fine numerics of the published results: the direction of a zero gradient is zero,
# and a perturbation outside the ball is scaled by epsilon / (norm + 1e-7).
_DIRECTION_OFFSET = 1e-10
_PROJECTION_OFFSET = 1e-7
_ADAM_OFFSET = 1e-8
_LARGEST = float(np.finfo(np.float32).max)


def l2_norm(x: jax.Array) -> jax.Array:
    """Euclidean norm per image, axes kept: [..., H, W, C] -> [..., 1, 1, 1]."""
    return jnp.sqrt(jnp.square(x).sum(axis=(-3, -2, -1), keepdims=True))


def unit(x: jax.Array) -> jax.Array:
    """Each image scaled to L2 length one; zero where it is zero."""
    return x / (l2_norm(x) + _DIRECTION_OFFSET)


# Projections: where an image may be.


def clip(images: jax.Array) -> jax.Array:
    """No constraint but the range of pixels, [0, 1]."""
    return jnp.clip(images, 0.0, 1.0)


def project_l2(
    images: jax.Array, origin: jax.Array, epsilon: jax.Array | float
) -> jax.Array:
    """Scales images - origin back to length epsilon, then clips to [0, 1].

    The norm of the result may end below epsilon, as the clip comes last.

    Args:
      images, origin: [..., H, W, C].
      epsilon: radius > 0, one for all or [..., 1, 1, 1].
    """
    delta = images - origin
    norm = l2_norm(delta)
    scale = jnp.where(norm > epsilon, epsilon / (norm + _PROJECTION_OFFSET), 1.0)
    return clip(origin + delta * scale)


def project_linf(
    images: jax.Array, origin: jax.Array, epsilon: jax.Array | float
) -> jax.Array:
    """Clips images - origin to [-epsilon, epsilon], then to [0, 1]; as `project_l2`."""
    delta = jnp.clip(images - origin, -epsilon, epsilon)
    return clip(origin + delta)


# Rules: how a gradient moves an image.


class Rule(NamedTuple):
    """How a gradient moves an image."""

    #: Images [B, H, W, C] -> memory, a tree of arrays [B, ., ., .], so that images can
    #: stop one by one; () if a rule needs only the last gradient.
    init: Callable[[jax.Array], Any]
    #: (keys [B] or None, images and gradients at them [B, H, W, C], memory, step_size
    #: [] or [B, 1, 1, 1]) -> (images before the projection, memory). Keys are new in
    #: every step.
    move: Callable[..., tuple[jax.Array, Any]]
    by_length: bool = True  #: whether the step size is the L2 length of every step


def along(
    direction: Callable[[jax.Array], jax.Array],
    init: Callable[[jax.Array], Any] = lambda images: (),
    update: UpdateFn = lambda gradients, memory: (gradients, memory),
) -> Rule:
    """x <- x + step_size * direction(v), with v from `update` of the gradients.

    By default v is the gradient itself. `unit` makes steps of a given length.
    """

    def move(
        keys: jax.Array | None,
        images: jax.Array,
        gradients: jax.Array,
        memory: Any,
        step_size: jax.Array,
    ) -> tuple[jax.Array, Any]:
        del keys
        v, memory = update(gradients, memory)
        return images + step_size * direction(v), memory

    return Rule(init, move, by_length=direction is unit)


def velocity(decay: float) -> tuple[Callable[[jax.Array], Any], UpdateFn]:
    """`init` and `update` of v <- decay * v + g / (||g||_1 + 1e-10), per image."""

    def update(gradients: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        length = jnp.abs(gradients).sum(axis=(1, 2, 3), keepdims=True)
        v = decay * v + gradients / (length + _DIRECTION_OFFSET)
        return v, v

    return jnp.zeros_like, update


def pgd() -> Rule:
    """x <- x + step_size * g / ||g||_2: the paper's rule, in L2 pixels per step."""
    return along(unit)


def sign() -> Rule:
    """x <- x + step_size * sign(g), in Linf pixels per step (Madry et al., 2018).

    A pixel whose gradient is zero stays.
    """
    return along(jnp.sign)


def momentum(decay: float = 0.9) -> Rule:
    """x <- x + step_size * v / ||v||_2, v the `velocity` (Dong et al., 2018).

    Args:
      decay: of the velocity, in [0, 1); with 0 it is `pgd`.

    Raises:
      UserError: any other decay.
    """
    if not _is_decay(decay):
        raise UserError(
            f"momentum decay is {decay!r}: it must lie in [0, 1), in float32 too."
        )
    return along(unit, *velocity(decay))


def adam(beta1: float = 0.9, beta2: float = 0.999) -> Rule:
    """Adam's direction scaled to length one (Kingma and Ba, 2015).

    Step sizes are then L2 pixels per step, as of `pgd`.

    Args:
      beta1, beta2: decays of mean and square of the gradients, in [0, 1).

    Raises:
      UserError: any other decay.
    """
    if not (_is_decay(beta1) and _is_decay(beta2)):
        raise UserError(
            f"Adam's decays are beta1={beta1!r}, beta2={beta2!r}: expected numbers in "
            "[0, 1), in float32 too."
        )

    def init(images: jax.Array) -> tuple[jax.Array, ...]:
        zero = jnp.zeros_like(images)
        return zero, zero, zero[:, :1, :1, :1]

    def update(gradients: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        mean, square, steps = memory
        steps = steps + 1.0
        mean = beta1 * mean + (1 - beta1) * gradients
        square = beta2 * square + (1 - beta2) * jnp.square(gradients)
        root = jnp.sqrt(square / (1 - beta2**steps))
        direction = mean / (1 - beta1**steps) / (root + _ADAM_OFFSET)
        return direction, (mean, square, steps)

    return along(unit, init, update)


def sgld(noise: float = 0.01) -> Rule:
    """x <- x + step_size * g + noise * n, n standard normal (Grathwohl et al., 2020).

    The step size multiplies the gradient itself. JEM takes 1 with noise 0.01 on images
    in [-1, 1]; on these, in [0, 1], that is step size 0.25 with "sgld(noise=0.005)".
    Langevin dynamics proper would have noise = sqrt(2 * step_size).

    Args:
      noise: standard deviation, pixels of a [0, 1] image, finite and >= 0.

    Raises:
      UserError: it is negative or not finite.
    """
    if not 0 <= noise <= _LARGEST:
        raise UserError(
            f"SGLD's noise is {noise!r}: it must be finite and not negative, in "
            "float32 too."
        )

    def move(
        keys: jax.Array,
        images: jax.Array,
        gradients: jax.Array,
        memory: Any,
        step_size: jax.Array,
    ) -> tuple[jax.Array, Any]:
        normal = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys)
        return images + step_size * gradients + noise * normal, memory

    return Rule(lambda images: (), move, by_length=False)


#: Rules by name. Their arguments, numbers with defaults, are their settings. Users know
#: rules as samplers.
RULES: dict[str, Callable[..., Rule]] = {
    "pgd": pgd,
    "momentum": momentum,
    "adam": adam,
    "sgld": sgld,
    "sign": sign,
}


def rule(text: str) -> Rule:
    """A rule from its text, "pgd" or "sgld(noise=0.005)".

    Args:
      text: a key of `RULES`, and settings by name that are not to be the defaults.

    Raises:
      UserError: no such rule or setting, one that is no number or out of its range.
    """
    name, given = calls.choice("sampler", RULES, text)
    return RULES[name](**given)


def _is_decay(value: float) -> bool:
    """Whether a number lies in [0, 1), in float32 too, in which it is used."""
    return 0 <= value < 1 and bool(np.float32(value) < 1)


# Schedules: how the step size goes from the first step to the last.


def _progress(step: jax.Array, num_steps: jax.Array) -> jax.Array:
    return step.astype(jnp.float32) / jnp.maximum(num_steps, 1).astype(jnp.float32)


#: "linear" and "cosine" fall from 1 towards 0, which would be the step after the last.
SCHEDULES: dict[str, ScheduleFn] = {
    "constant": lambda step, num_steps: 1.0,
    "linear": lambda step, num_steps: 1.0 - _progress(step, num_steps),
    "cosine": lambda step, num_steps: (
        0.5 + 0.5 * jnp.cos(jnp.pi * _progress(step, num_steps))
    ),
}


# The loop.


class State(NamedTuple):
    """images: [B, H, W, C] in [0, 1]; memory: the rule's."""

    images: jax.Array
    memory: Any


#: The rule of the method itself.
PGD = pgd()


@jax.named_scope("climb")
def climb(
    objective: ObjectiveFn,
    images: jax.Array,
    rule: Rule = PGD,
    *,
    keys: jax.Array | None = None,
    step_size: jax.Array | float,
    num_steps: jax.Array | int,
    project: ProjectFn = clip,
    keep_best: bool = False,
) -> jax.Array:
    """Raises a per-image score.

    Args:
      objective: images [B, H, W, C] -> scores [B], to be maximised.
      images: [B, H, W, C] float in [0, 1], where the ascent begins.
      rule: how a gradient moves an image.
      keys: [B], one an image, for rules with noise; step t folds t in.
      step_size: as of the rule; one for all or [B, 1, 1, 1].
      num_steps: >= 0; a traced int32 never recompiles.
      project: constraint on the images, which also keeps them in [0, 1].
      keep_best: return, per image, the iterate (the start included) with the highest
        score instead of the last one; costs one more evaluation.

    Returns:
      [B, H, W, C] images where `project` leads; the given ones after no step.
    """
    number = jnp.asarray(num_steps, jnp.int32)
    scored = lambda x: (objective(x), None)
    advance = step_fn(scored, rule, keys, step_size, number, project=project)

    def step(t: jax.Array, carry: tuple[State, Any]) -> tuple[State, Any]:
        state, best = carry
        new, scores, _ = advance(t, state)
        return new, _better(best, state.images, scores) if keep_best else None

    lowest = jnp.full(images.shape[0], -jnp.inf, images.dtype)
    first = (State(images, rule.init(images)), (images, lowest) if keep_best else None)
    state, best = jax.lax.fori_loop(0, number, step, first)
    if not keep_best:
        return state.images
    return _better(best, state.images, objective(state.images))[0]


@jax.named_scope("climb")
def climb_through(
    objective: ObjectiveFn,
    images: jax.Array,
    rule: Rule = PGD,
    *,
    keys: jax.Array | None = None,
    step_size: jax.Array | float,
    ends: jax.Array,
    schedule: ScheduleFn = SCHEDULES["constant"],
    target: jax.Array | float | None = None,
) -> jax.Array:
    """`climb` that shows the images at several numbers of steps of one trajectory.

    Args:
      ends: [S] int32, ascending numbers of steps; traced ones never recompile. The
        schedule ends with the last of them.
      schedule: factor of the step size in each step.
      target: score (minus an energy) from which on an image stays as it is; None for
        all steps. The others go on, and the loop runs all of its steps.

    Returns:
      [S, B, H, W, C], each what `climb` makes in so many steps.
    """
    scored = lambda x: (objective(x), None)
    advance = step_fn(scored, rule, keys, step_size, ends[-1], schedule, target=target)

    def part(
        carry: tuple[jax.Array, State], last: jax.Array
    ) -> tuple[tuple[jax.Array, State], jax.Array]:
        first, state = carry
        state = jax.lax.fori_loop(first, last, lambda t, s: advance(t, s)[0], state)
        return (last, state), state.images

    start = (jnp.int32(0), State(images, rule.init(images)))
    return jax.lax.scan(part, start, ends)[1]


def step_fn(
    objective: Callable[[jax.Array], tuple[jax.Array, Any]],
    rule: Rule,
    keys: jax.Array | None,
    step_size: jax.Array | float,
    num_steps: jax.Array,
    schedule: ScheduleFn = SCHEDULES["constant"],
    project: ProjectFn = clip,
    target: jax.Array | float | None = None,
) -> Callable[[jax.Array, State], tuple[State, jax.Array, Any]]:
    """One step of a climb.

    Args:
      objective: images [B, H, W, C] -> (scores [B], readings: any tree of arrays).
      rule, keys, step_size, num_steps, project: as of `climb`.
      schedule, target: as of `climb_through`.

    Returns:
      (t, state) -> the state after step t; scores and readings before it.
    """

    def advance(t: jax.Array, state: State) -> tuple[State, jax.Array, Any]:
        scores, pullback, readings = jax.vjp(objective, state.images, has_aux=True)
        (gradients,) = pullback(jnp.ones_like(scores))
        size = step_size * schedule(t, num_steps)
        now = None
        if keys is not None:
            now = jax.vmap(lambda key: jax.random.fold_in(key, t))(keys)
        moved, memory = rule.move(now, state.images, gradients, state.memory, size)
        new = State(project(moved), memory)
        if target is not None:
            going = (scores < target)[:, None, None, None]
            new = jax.tree.map(lambda a, b: jnp.where(going, a, b), new, state)
        return new, scores, readings

    return advance


def _better(best: Any, images: jax.Array, scores: jax.Array) -> Any:
    """The best images so far and their scores."""
    better = scores > best[1]
    mask = better[:, None, None, None]
    return jnp.where(mask, images, best[0]), jnp.where(better, scores, best[1])
