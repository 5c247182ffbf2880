"""What an attacker may do: threat models, and the adversary of the classifier.

A threat model gives the ascent (`ascent.climb`) the direction of its steps and the ball
that its images stay in (Madry et al., 2018).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from atebm_jax import ascent, losses
from atebm_jax.ascent import ObjectiveFn
from atebm_jax.errors import UserError, check_choice


class Threat(NamedTuple):
    """What an attacker may do to an image."""

    norm: str  #: "l2", "linf" or "unbounded"
    epsilon: jax.Array | float  #: radius, in the norm's pixels of a [0, 1] image
    #: Gradients [B, H, W, C] -> unit steps [B, H, W, C].
    direction: Callable[[jax.Array], jax.Array]
    #: (images, origin), both [B, H, W, C] -> images in the ball around the origin,
    #: then clipped to [0, 1].
    project: Callable[[jax.Array, jax.Array], jax.Array]


def l2(epsilon: jax.Array | float) -> Threat:
    """Euclidean ball of radius epsilon around each image.

    Args:
      epsilon: radius > 0 in L2 pixels of a [0, 1] image; may be infinite.

    Raises:
      UserError: epsilon is not positive.
    """
    return _ball("l2", epsilon, ascent.unit, ascent.project_l2)


def linf(epsilon: jax.Array | float) -> Threat:
    """Cube of half-width epsilon around each image.

    Args:
      epsilon: radius > 0 in pixels of a [0, 1] image (8/255, say); may be infinite.

    Returns:
      The threat; its direction is the sign of the gradient, zero where it is zero.

    Raises:
      UserError: epsilon is not positive.
    """
    return _ball("linf", epsilon, jnp.sign, ascent.project_linf)


def _ball(
    norm: str,
    epsilon: jax.Array | float,
    direction: Callable[[jax.Array], jax.Array],
    project: Callable[..., jax.Array],
) -> Threat:
    # A radius of run time is not checked, and taken for a finite one.
    if not isinstance(epsilon, jax.Array):
        if not epsilon > 0:
            raise UserError(
                f"{norm} radius epsilon is {epsilon!r}: it must be positive; "
                "for no attack at all set the number of steps to 0."
            )
        if math.isinf(epsilon):
            return unbounded()._replace(norm=norm, direction=direction)
    onto = lambda images, origin: project(images, origin, epsilon)
    return Threat(norm, epsilon, direction, onto)


def unbounded() -> Threat:
    """No ball: L2 steps, then only the clip to [0, 1]."""
    return Threat(
        "unbounded",
        float("inf"),
        ascent.unit,
        lambda images, origin: ascent.clip(images),
    )


#: Threat models by their names in the config, as functions of the radius.
THREATS: dict[str, Callable[[jax.Array | float], Threat]] = {
    "l2": l2,
    "linf": linf,
    "unbounded": lambda epsilon: unbounded(),
}


def threat(norm: str, epsilon: jax.Array | float) -> Threat:
    """Builds a threat model by name.

    Args:
      norm: a key of `THREATS`.
      epsilon: radius in pixels of a [0, 1] image; ignored by "unbounded".

    Raises:
      UserError: unknown norm, or a radius that is not positive.
    """
    check_choice("threat norm", norm, THREATS)
    return THREATS[norm](epsilon)


def attack(
    objective: ObjectiveFn,
    images: jax.Array,
    threat: Threat,
    *,
    step_size: jax.Array | float,
    num_steps: jax.Array | int,
    momentum: float = 0.0,
    keep_best: bool = False,
) -> jax.Array:
    """Projected gradient ascent as far as a threat allows.

    With momentum or keep_best the steps follow the velocity of L1-normalised gradients
    (Dong et al., 2018). The adversary of stage 1 in the paper's published code does so
    (momentum 0.9, keep_best).

    Args:
      objective: images [B, H, W, C] -> scores [B], to be maximised.
      images: [B, H, W, C] float in [0, 1], start and centre of the ball.
      threat: direction and projection.
      step_size: length of a step, in pixels of the threat's norm.
      num_steps: number of steps >= 0; a traced int32 never recompiles.
      momentum: decay of the velocity, in [0, 1).
      keep_best: return the best iterate, as of `ascent.climb`.

    Returns:
      [B, H, W, C] images in [0, 1], inside the ball.
    """
    rule = ascent.along(threat.direction)
    if momentum or keep_best:
        rule = ascent.along(threat.direction, *ascent.velocity(momentum))
    return ascent.climb(
        objective,
        images,
        rule,
        step_size=step_size,
        num_steps=num_steps,
        project=lambda x: threat.project(x, images),
        keep_best=keep_best,
    )


def adversary(
    *,
    norm: str,
    epsilon: float,
    step_size: float,
    num_steps: int,
    momentum: float = 0.0,
    keep_best: bool = False,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = losses.cross_entropy,
) -> Callable[..., jax.Array]:
    """The adversary that maximises the cross-entropy inside a ball.

    Training, evaluation and `Model.attack` make theirs here, from the fields of an
    `adversary` block of the config.

    Args:
      norm, epsilon: as of `threat`.
      step_size, num_steps, momentum, keep_best: as of `attack`.
      loss: (logits [B, K], labels [B]) -> [B], what it maximises instead.

    Returns:
      (logits_fn, images [B, H, W, C], labels [B]) -> adversarial images [B, H, W, C].
      It also takes `epsilon`, `step_size` and `num_steps` as keywords; other values
      than these do not recompile. They are not checked.

    Raises:
      UserError: unknown norm, or a value out of its range.
    """
    threat(norm, epsilon)  # refuses what is none
    if num_steps < 0 or not 0 <= momentum < 1:
        raise UserError(
            f"adversary.num_steps is {num_steps} and adversary.momentum {momentum}: "
            "the steps must not be negative, the momentum lies in [0, 1)."
        )
    own_epsilon, own_step_size, own_num_steps = epsilon, step_size, num_steps

    @jax.named_scope("adversary")
    def perturb(
        logits_fn: Callable[[jax.Array], jax.Array],
        images: jax.Array,
        labels: jax.Array,
        *,
        epsilon: jax.Array | float = own_epsilon,
        step_size: jax.Array | float = own_step_size,
        num_steps: jax.Array | int = own_num_steps,
    ) -> jax.Array:
        return attack(
            lambda x: loss(logits_fn(x), labels),
            images,
            threat(norm, epsilon),
            step_size=step_size,
            num_steps=num_steps,
            momentum=momentum,
            keep_best=keep_best,
        )

    return perturb
