"""FAB and targeted FAB: fast adaptive boundary (Croce and Hein, 2020b).

Looks for the smallest perturbation that changes the class. Around the iterate the
network is taken as linear. Iterate and image are both projected onto the nearest
decision boundary of that linear network, inside the box [0, 1]. The next iterate is a
mixture of the two projections, both a little beyond. If it is misclassified, it is kept
where it is the nearest so far, and the search steps back towards the image.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from atebm_jax import energy
from atebm_jax.autoattack import apgd, balls
from atebm_jax.autoattack.apgd import ModelFn
from atebm_jax.autoattack.balls import per_image
from atebm_jax.autoattack.objectives import targeted_margin

# (x [B, H, W, C]) -> margin [B], its gradient [B, H, W, C]: the boundary to approach.
BoundaryFn = Callable[[jax.Array], tuple[jax.Array, jax.Array]]

# The paper's settings for AutoAttack.
_OVERSHOOT = 1.05
_BACKWARD = 0.9
_MAX_BIAS = 0.1
_SMALLEST_STEP = 1e-8
# Newton steps on a concave piecewise linear function, which they reach from below.
_NEWTON_STEPS = 12

# Distances to a plane in a norm are measured by its normal in the dual norm.
_DUAL = {"linf": "l1", "l2": "l2"}
NORMS = tuple(_DUAL)


class State(NamedTuple):
    """The search after some steps."""

    x: jax.Array  #: [B, H, W, C] iterates
    nearest: jax.Array  #: [B, H, W, C] nearest misclassified iterates, or the images
    distance: jax.Array  #: [B] their distances, infinite if none


def step_to_plane(
    x: jax.Array, normal: jax.Array, gap: jax.Array, norm: str
) -> jax.Array:
    """The shortest d with <normal, d> = gap and x + d in [0, 1].

    Let w = |normal|, and u the room of each pixel in the direction it has to go. Signs
    aside, the solution is min(t, u) for Linf and min(t w, u) for L2, with the t that
    reaches the plane. The reach is concave and piecewise linear in t, so that Newton's
    method from below meets t exactly after a few steps. It needs no sorting, which
    would be expensive inside a loop.

    Args:
      x, normal: [B, H, W, C] float; x in [0, 1].
      gap: [B] float.
      norm: "linf" or "l2".

    Returns:
      [B, H, W, C] steps; where the plane cannot be reached, the step to the corner of
      the box that is nearest to it.
    """
    scale = balls.LENGTHS["linf"](normal) + 1e-30
    towards = normal / per_image(jnp.where(gap < 0, -scale, scale))
    gap = jnp.abs(gap) / scale
    weight = jnp.abs(towards)
    room = jnp.where(towards > 0, 1.0 - x, x)
    # How fast a pixel moves with t, and how fast that brings the plane nearer.
    speed = jnp.ones_like(weight) if norm == "linf" else weight
    gain = weight * speed

    def newton(_: int, t: jax.Array) -> jax.Array:
        free = per_image(t) * speed < room
        rate = jnp.where(free, gain, 0.0).sum(axis=(1, 2, 3))
        used = jnp.where(free, 0.0, weight * room).sum(axis=(1, 2, 3))
        return jnp.where(rate > 0, (gap - used) / jnp.where(rate > 0, rate, 1.0), 1e30)

    t = jax.lax.fori_loop(0, _NEWTON_STEPS, newton, jnp.zeros_like(gap))
    return jnp.sign(towards) * jnp.clip(per_image(t) * speed, 0.0, room)


def targeted_boundary(
    model: ModelFn, key: jax.Array, labels: jax.Array, targets: jax.Array
) -> BoundaryFn:
    """The boundary to one other class: f[t] - f[y] and its gradient."""

    def margin(logits: jax.Array) -> jax.Array:
        return targeted_margin(logits, labels, targets)

    evaluate = apgd.evaluator(model, margin, labels)
    return lambda x: evaluate(x, key)[:2]


def nearest_boundary(
    model: ModelFn, key: jax.Array, labels: jax.Array, norm: str
) -> BoundaryFn:
    """Of the boundaries to all other classes, the nearest of the linearised network.

    One backward pass a class, one at a time: memory does not grow with the classes.
    """

    def boundary(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, pullback = jax.vjp(lambda x: model(x, key), x)
        num_classes = logits.shape[-1]
        own = jax.nn.one_hot(labels, num_classes, dtype=logits.dtype)
        own_logits = energy.at_labels(logits, labels)
        dual_length = balls.LENGTHS[_DUAL[norm]]

        def look(k: jax.Array, found: tuple) -> tuple:
            hot = jax.nn.one_hot(k, num_classes, dtype=logits.dtype)
            values = logits @ hot - own_logits
            (gradient,) = pullback(hot[None, :] - own)
            distance = jnp.abs(values) / (dual_length(gradient) + 1e-12)
            nearer = (k != labels) & (distance < found[0])
            return (
                jnp.where(nearer, distance, found[0]),
                jnp.where(nearer, values, found[1]),
                jnp.where(per_image(nearer), gradient, found[2]),
            )

        nothing = (jnp.full_like(logits[:, 0], jnp.inf), logits[:, 0] * 0, x * 0)
        return jax.lax.fori_loop(0, num_classes, look, nothing)[1:]

    return boundary


def search(
    boundary: BoundaryFn,
    correct: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    start: jax.Array,
    num_steps: jax.Array | int,
    *,
    norm: str,
) -> State:
    """Looks for the nearest misclassified image.

    Args:
      boundary: margin, negative where correct, and its gradient at some images.
      correct: images -> [B] bool.
      images: [B, H, W, C] in [0, 1], what to stay near.
      start: [B, H, W, C] first iterate.
      num_steps: [] int32.
      norm: "linf" or "l2".
    """

    def step(_: jax.Array, state: State) -> State:
        x = _towards_boundary(*boundary(state.x), images, state.x, norm)
        return _record(images, state, x, ~correct(x), norm)

    nothing = jnp.full(images.shape[:1], jnp.inf, images.dtype)
    return jax.lax.fori_loop(0, num_steps, step, State(start, images, nothing))


def _towards_boundary(
    margin: jax.Array, normal: jax.Array, images: jax.Array, x: jax.Array, norm: str
) -> jax.Array:
    """A little beyond the mixture of the projections of iterate and image."""
    offset = (normal * (x - images)).sum(axis=(1, 2, 3))
    # Both projections at once: twice the batch, one loop.
    steps = step_to_plane(
        jnp.stack([x, images], 1).reshape(-1, *images.shape[1:]),
        jnp.repeat(normal, 2, axis=0),
        jnp.stack([-margin, offset - margin], 1).reshape(-1),
        norm,
    )
    steps = steps.reshape(images.shape[0], 2, *images.shape[1:])
    here, home = steps[:, 0], steps[:, 1]
    length = balls.LENGTHS[norm]
    near = jnp.maximum(length(here), _SMALLEST_STEP)
    far = jnp.maximum(length(home), _SMALLEST_STEP)
    bias = per_image(jnp.minimum(near / (near + far), _MAX_BIAS))
    mixed = (x + _OVERSHOOT * here) * (1.0 - bias)
    return jnp.clip(mixed + (images + _OVERSHOOT * home) * bias, 0.0, 1.0)


def _record(
    images: jax.Array, state: State, x: jax.Array, wrong: jax.Array, norm: str
) -> State:
    distance = balls.LENGTHS[norm](x - images)
    nearer = wrong & (distance < state.distance)
    return State(
        x=jnp.where(per_image(wrong), images + (x - images) * _BACKWARD, x),
        nearest=jnp.where(per_image(nearer), x, state.nearest),
        distance=jnp.where(nearer, distance, state.distance),
    )
