"""Threat models and projected gradient ascent: the one inner loop of the method.

x <- P(x + step_size * d(g)), g the gradient of a per-image objective with respect to
the image, d the direction and P the projection of a threat model (Madry et al., 2018).

Nothing here knows a model: an objective is any callable from images [B, H, W, C] to
scores [B] in which every score depends on its own image only. `pgd` always ascends.
The loop never differentiates through itself and its trip count may be a traced int32,
so that one compilation serves every number of steps.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from atebm_jax.errors import UserError

#: Images [B, H, W, C] to scores [B], each of its own image only.
ObjectiveFn = Callable[[jax.Array], jax.Array]

# Fine numerics of the published results: the direction of a zero gradient is zero,
# and a perturbation outside the ball is scaled by eps / (norm + 1e-7).
_DIRECTION_OFFSET = 1e-10
_PROJECTION_OFFSET = 1e-7


class Threat(NamedTuple):
    """What an attacker may do to an image.

    Attributes:
      norm: "l2", "linf" or "unbounded".
      epsilon: radius of the ball, in the norm's pixels of a [0, 1] image.
      direction: gradients [B, H, W, C] -> unit steps [B, H, W, C].
      project: (images, origin), both [B, H, W, C] -> images in the ball around
        the origin, then clipped to [0, 1].
      random_start: (key, origin) -> images uniform in the ball around the origin,
        clipped to [0, 1]; independent per image. Never used in training.
    """

    norm: str
    epsilon: float
    direction: Callable[[jax.Array], jax.Array]
    project: Callable[[jax.Array, jax.Array], jax.Array]
    random_start: Callable[[jax.Array, jax.Array], jax.Array]


def l2_norm(x: jax.Array) -> jax.Array:
    """Euclidean norm per image, axes kept: [..., H, W, C] -> [..., 1, 1, 1]."""
    return jnp.sqrt(jnp.square(x).sum(axis=(-3, -2, -1), keepdims=True))


def project_l2(
    images: jax.Array, origin: jax.Array, epsilon: jax.Array | float
) -> jax.Array:
    """Scales images - origin back to length epsilon, then clips to [0, 1].

    Args:
      images, origin: [..., H, W, C].
      epsilon: radius > 0, one for all or [..., 1, 1, 1].
    """
    delta = images - origin
    norm = l2_norm(delta)
    scale = jnp.where(norm > epsilon, epsilon / (norm + _PROJECTION_OFFSET), 1.0)
    return jnp.clip(origin + delta * scale, 0.0, 1.0)


def project_linf(
    images: jax.Array, origin: jax.Array, epsilon: jax.Array | float
) -> jax.Array:
    """Clips images - origin to [-epsilon, epsilon], then to [0, 1]; as `project_l2`."""
    delta = jnp.clip(images - origin, -epsilon, epsilon)
    return jnp.clip(origin + delta, 0.0, 1.0)


def l2(epsilon: float) -> Threat:
    """Euclidean ball of radius epsilon around each image.

    Args:
      epsilon: radius > 0 in L2 pixels of a [0, 1] image; may be infinite.

    Returns:
      The threat. The ball's scaling comes before the clip to [0, 1], so that the norm
      of the result may end below epsilon.

    Raises:
      UserError: epsilon is not positive.
    """
    _check_radius("l2", epsilon)
    if math.isinf(epsilon):
        return unbounded()._replace(norm="l2")

    def project(images: jax.Array, origin: jax.Array) -> jax.Array:
        return project_l2(images, origin, epsilon)

    def random_start(key: jax.Array, origin: jax.Array) -> jax.Array:
        # Uniform in a ball of d dimensions: a Gaussian's direction, radius u^(1/d).
        key_direction, key_radius = jax.random.split(key)
        gaussian = jax.random.normal(key_direction, origin.shape, origin.dtype)
        uniform = jax.random.uniform(
            key_radius, (origin.shape[0], 1, 1, 1), origin.dtype
        )
        radius = epsilon * uniform ** (1.0 / origin[0].size)
        return jnp.clip(origin + radius * _l2_direction(gaussian), 0.0, 1.0)

    return Threat("l2", epsilon, _l2_direction, project, random_start)


def linf(epsilon: float) -> Threat:
    """Cube of half-width epsilon around each image.

    Args:
      epsilon: radius > 0 in pixels of a [0, 1] image (8/255, say); may be infinite.

    Returns:
      The threat; its direction is the sign of the gradient, zero where it is zero.

    Raises:
      UserError: epsilon is not positive.
    """
    _check_radius("linf", epsilon)
    if math.isinf(epsilon):
        return unbounded()._replace(norm="linf", direction=jnp.sign)

    def project(images: jax.Array, origin: jax.Array) -> jax.Array:
        return project_linf(images, origin, epsilon)

    def random_start(key: jax.Array, origin: jax.Array) -> jax.Array:
        noise = jax.random.uniform(
            key, origin.shape, origin.dtype, minval=-epsilon, maxval=epsilon
        )
        return jnp.clip(origin + noise, 0.0, 1.0)

    return Threat("linf", epsilon, jnp.sign, project, random_start)


def unbounded() -> Threat:
    """No ball: L2 steps, then only the clip to [0, 1] (contrastive images, samples)."""

    def project(images: jax.Array, origin: jax.Array) -> jax.Array:
        del origin
        return jnp.clip(images, 0.0, 1.0)

    def random_start(key: jax.Array, origin: jax.Array) -> jax.Array:
        return jax.random.uniform(key, origin.shape, origin.dtype)

    return Threat("unbounded", float("inf"), _l2_direction, project, random_start)


#: Threat models by the name that `config` blocks give them, from the radius.
THREATS: dict[str, Callable[[float], Threat]] = {
    "l2": l2,
    "linf": linf,
    "unbounded": lambda epsilon: unbounded(),
}


def threat(norm: str, epsilon: float) -> Threat:
    """Builds a threat model by name.

    Args:
      norm: a key of `THREATS`.
      epsilon: radius in pixels of a [0, 1] image; ignored by "unbounded".

    Raises:
      UserError: unknown norm, or a radius that is not positive.
    """
    if norm not in THREATS:
        raise UserError(
            f"unknown threat norm {norm!r}: choose one of {', '.join(THREATS)}."
        )
    return THREATS[norm](epsilon)


def pgd(
    objective: ObjectiveFn,
    images: jax.Array,
    *,
    threat: Threat,
    step_size: jax.Array | float,
    num_steps: jax.Array | int,
    start: jax.Array | None = None,
) -> jax.Array:
    """Projected gradient ascent on the sum of a per-image objective.

    Args:
      objective: images [B, H, W, C] -> scores [B], to be maximised.
      images: [B, H, W, C] float in [0, 1], the centre of the ball.
      threat: direction and projection.
      step_size: length of a step, in pixels of the threat's norm.
      num_steps: number of steps >= 0; a traced int32 never recompiles.
      start: where to begin, default `images`; `threat.random_start` makes others.

    Returns:
      [B, H, W, C] images in [0, 1] after `num_steps` steps; the start after none.
    """
    image_gradient = jax.grad(lambda x: objective(x).sum())

    def ascend(_: jax.Array, x: jax.Array) -> jax.Array:
        step = step_size * threat.direction(image_gradient(x))
        return threat.project(x + step, images)

    first = images if start is None else start
    return jax.lax.fori_loop(0, jnp.asarray(num_steps, jnp.int32), ascend, first)


def momentum_pgd(
    objective: ObjectiveFn,
    images: jax.Array,
    *,
    threat: Threat,
    step_size: jax.Array | float,
    num_steps: jax.Array | int,
    momentum: float = 0.0,
    keep_best: bool = False,
) -> jax.Array:
    """`pgd` with momentum on L1-normalised gradients and memory of the best iterate.

    v <- momentum * v + g / (||g||_1 + 1e-10), x <- P(x + step_size * d(v)): the
    momentum iterative method (Dong et al., 2018), the adversary of stage 1 in the
    paper's published code (momentum 0.9, keep_best).

    Args:
      objective: images [B, H, W, C] -> scores [B], to be maximised.
      images: [B, H, W, C] float in [0, 1], start and centre of the ball.
      threat: direction and projection.
      step_size: length of a step, in pixels of the threat's norm.
      num_steps: number of steps >= 0; a traced int32 never recompiles.
      momentum: decay of the velocity, in [0, 1).
      keep_best: return, per image, the iterate (the start included) with the highest
        objective instead of the last one; costs one more evaluation.

    Returns:
      [B, H, W, C] images in [0, 1].
    """

    def value_and_gradient(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, pullback = jax.vjp(objective, x)
        return values, pullback(jnp.ones_like(values))[0]

    def remember(x: jax.Array, values: jax.Array, best: tuple) -> tuple:
        better = values > best[1]
        mask = better[:, None, None, None]
        return jnp.where(mask, x, best[0]), jnp.where(better, values, best[1])

    def ascend(_: jax.Array, carry: tuple) -> tuple:
        x, velocity, best = carry
        values, gradient = value_and_gradient(x)
        length = jnp.abs(gradient).sum(axis=(1, 2, 3), keepdims=True)
        velocity = momentum * velocity + gradient / (length + _DIRECTION_OFFSET)
        best = remember(x, values, best)
        x = threat.project(x + step_size * threat.direction(velocity), images)
        return x, velocity, best

    lowest = jnp.full(images.shape[0], -jnp.inf, images.dtype)
    carry = (images, jnp.zeros_like(images), (images, lowest))
    carry = jax.lax.fori_loop(0, jnp.asarray(num_steps, jnp.int32), ascend, carry)
    last, _, best = carry
    return remember(last, objective(last), best)[0] if keep_best else last


def _l2_direction(gradients: jax.Array) -> jax.Array:
    return gradients / (l2_norm(gradients) + _DIRECTION_OFFSET)


def _check_radius(norm: str, epsilon: float) -> None:
    if not epsilon > 0:
        raise UserError(
            f"{norm} radius epsilon is {epsilon!r}: it must be positive; "
            "for no attack at all set the number of steps to 0."
        )
