"""What an edit may not change: sets of images, each with its projection.

An edit lowers the energy and is projected back into the set after every step.
Inpainting, class translation, denoising and super-resolution differ only in the set.
Every set has `start`, images of the set, and `project`, which `ascent.climb` takes.

A constraint is a pytree whose arrays have the image first. It passes through `jit` as
an argument, is split over devices like a batch, and works on single images [H, W, C]
under `vmap`. The functions below check their arguments; the classes do not.
"""

import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atebm_jax import ascent
from atebm_jax.errors import UserError, check_choice

_PROJECTIONS = {"l2": ascent.project_l2, "linf": ascent.project_linf}
# Halvings of an interval of a few pixels, down to float32's resolution.
_BISECTIONS = 32
FILLS = ("mean", "noise", "image")


@runtime_checkable
class Constraint(Protocol):
    """A set of images in [0, 1].

    start: [B, H, W, C], images of the set where an edit begins.
    """

    @property
    def start(self) -> Any: ...

    def project(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] images to images of the set."""
        ...


@struct.dataclass
class Ball:
    """Images near an original, in [0, 1] (paper, section 5).

    The projection is that of `ascent`: into the ball, then clipped. The result lies in
    both sets. It is the nearest such point if nothing is clipped.
    """

    start: Any  #: [B, H, W, C] float32 in [0, 1], the originals
    radius: Any  #: [B, 1, 1, 1] float32 > 0, pixels of the norm
    norm: str = struct.field(pytree_node=False, default="l2")  #: or "linf"

    def project(self, images: jax.Array) -> jax.Array:
        return _PROJECTIONS[self.norm](images, self.start, self.radius)


@struct.dataclass
class Known:
    """Images with given pixels outside of a hole; the projection is the nearest one."""

    start: Any  #: [B, H, W, C] float32 in [0, 1], as given outside of the hole
    hole: Any  #: [B, H, W, 1] bool, True where pixels may change

    def project(self, images: jax.Array) -> jax.Array:
        return jnp.where(self.hole, ascent.clip(images), self.start)


@struct.dataclass
class BoxMean:
    """Images in [0, 1] whose average over boxes of pixels is a given small image.

    The projection is the nearest one: in every box clip(x + c, 0, 1) with the c that
    gives the mean, found by bisection. (Without the clip, c = mean - mean(x).)
    """

    small: Any  #: [B, H/F, W/F, C] float32 in [0, 1]
    factor: int = struct.field(pytree_node=False)  #: F, pixels along a side of a box

    @property
    def start(self) -> Any:
        tall = jnp.repeat(self.small, self.factor, axis=-3)
        return jnp.repeat(tall, self.factor, axis=-2)

    def project(self, images: jax.Array) -> jax.Array:
        *batch, height, width, channels = images.shape
        side = self.factor
        split = (*batch, height // side, side, width // side, side, channels)
        boxes = images.reshape(split)
        within = (-4, -2)
        wanted = jnp.expand_dims(self.small, within)

        def halve(_: jax.Array, bounds: tuple) -> tuple:
            low, high = bounds
            middle = 0.5 * (low + high)
            mean = jnp.clip(boxes + middle, 0.0, 1.0).mean(within, keepdims=True)
            under = mean < wanted
            return jnp.where(under, middle, low), jnp.where(under, high, middle)

        # The lowest shift makes a box black, the highest white.
        low = -boxes.max(within, keepdims=True)
        high = 1.0 - boxes.min(within, keepdims=True)
        low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (low, high))
        moved = jnp.clip(boxes + 0.5 * (low + high), 0.0, 1.0)
        return moved.reshape(images.shape)


@struct.dataclass
class All:
    """Images in every one of several sets, by projecting on each in turn, in rounds.

    The result lies in the last set exactly, and in the others up to what the rounds
    leave. For a hole and then a ball around the same image, one round is exact.
    """

    parts: tuple  #: of constraints
    rounds: int = struct.field(pytree_node=False, default=10)

    @property
    def start(self) -> Any:
        return self.project(self.parts[0].start)

    def project(self, images: jax.Array) -> jax.Array:
        def once(_: int, x: jax.Array) -> jax.Array:
            for part in self.parts:
                x = part.project(x)
            return x

        return jax.lax.fori_loop(0, self.rounds, once, images)


def ball(images: Any, radius: Any = 4.0, norm: str = "l2") -> Ball:
    """Near the images: class translation, counterfactuals.

    Args:
      images: [N, H, W, C] or one [H, W, C], float in [0, 1] or uint8.
      radius: > 0, of all or [N]: L2 or Linf pixels of a [0, 1] image.
      norm: "l2" or "linf".

    Raises:
      UserError: another norm, a radius that is not positive (Linf: or above 1).
    """
    origin = as_images(images)
    check_choice("norm", norm, _PROJECTIONS, of=" of a ball")
    radii = np.asarray(radius)
    if radii.dtype.kind not in "iuf" or radii.shape not in ((), (len(origin),)):
        raise UserError(
            f"radius is {radius!r}: expected a number, or one for each of "
            f"{len(origin)} images."
        )
    wrong = radii[~((radii > 0) & (radii < (np.inf if norm == "l2" else 1.0 + 1e-6)))]
    if wrong.size:
        most = "positive and finite" if norm == "l2" else "above 0 and at most 1"
        raise UserError(f"{norm} radius is {wrong.flat[0]:g}: it must be {most}.")
    rows = np.broadcast_to(radii.astype(np.float32), (len(origin),))
    return Ball(origin, rows[:, None, None, None], norm)


def inpaint(images: Any, mask: Any, *, fill: str = "mean", seed: int = 0) -> Known:
    """Repaints a hole; what lies outside of it stays.

    Args:
      images: [N, H, W, C] or one [H, W, C], float in [0, 1] or uint8.
      mask: True (or > 0.5 of floats, > 127 of uint8) where pixels may change: [H, W] or
        [H, W, 1] for all images, or [N, H, W, 1].
      fill: what the edit begins with in the hole: "mean" (of the pixels outside),
        "noise" (uniform, the same in every image) or "image" (as it is).
      seed: of the noise.

    Raises:
      UserError: a mask of another size, or one without a hole.
    """
    image = as_images(images)
    hole = as_holes(mask, image.shape)
    check_choice("fill", fill, FILLS)
    if fill == "noise":
        noise = jax.random.uniform(jax.random.key(seed), image.shape[1:])
        image = np.where(hole, np.asarray(noise), image)
    if fill == "mean":
        outside = np.broadcast_to(~hole, image.shape)
        count = np.maximum(outside.sum((1, 2), keepdims=True), 1)
        mean = (image * outside).sum((1, 2), keepdims=True) / count
        image = np.where(hole, mean.astype(np.float32), image)
    return Known(image, hole)


def denoise(images: Any, sigma: float, *, strength: float = 0.5) -> Ball:
    """Near noisy images: an L2 ball as wide as a share of the noise is long.

    White noise of H x W x C values has length sigma sqrt(HWC). An edit of that length
    goes past the clean image, because the energy goes on falling there (docs/edit.md).

    Args:
      images: [N, H, W, C] or one [H, W, C], float in [0, 1] or uint8.
      sigma: standard deviation of the noise, pixels of a [0, 1] image.
      strength: radius / (sigma sqrt(HWC)), > 0.

    Raises:
      UserError: sigma or strength is not positive.
    """
    check_noise(sigma, strength)
    origin = as_images(images)
    length = float(sigma) * math.sqrt(math.prod(origin.shape[1:]))
    return ball(origin, float(strength) * length)


def check_noise(sigma: float, strength: float = 0.5) -> None:
    """Refuses what `denoise` does.

    Raises:
      UserError: sigma or strength is not positive.
    """
    for name, value in {"sigma": sigma, "strength": strength}.items():
        if not isinstance(value, int | float | np.number) or not 0 < value < np.inf:
            raise UserError(f"{name} is {value!r}: it must be a positive number.")


def superres(images: Any, factor: int) -> BoxMean:
    """Larger images whose box averages are the given ones.

    Args:
      images: the small ones, [N, h, w, C] or one [h, w, C], float in [0, 1] or uint8.
      factor: whole number >= 2; the results are [N, factor * h, factor * w, C].

    Raises:
      UserError: another factor.
    """
    if not isinstance(factor, int | np.integer) or factor < 2:
        raise UserError(f"factor is {factor!r}: expected a whole number from 2 on.")
    return BoxMean(as_images(images), int(factor))


def together(*constraints: Any) -> All:
    """Several constraints on the same images; an edit begins at the first one's start.

    Raises:
      UserError: fewer than two.
    """
    if len(constraints) < 2:
        raise UserError(f"there are {len(constraints)} constraints: give two or more.")
    return All(tuple(constraints))


def balls(constraint: Any) -> list[Ball]:
    """The balls in a constraint."""
    if isinstance(constraint, All):
        return [found for part in constraint.parts for found in balls(part)]
    return [constraint] if isinstance(constraint, Ball) else []


def as_images(images: Any) -> np.ndarray:
    """Images as [N, H, W, C] float32 in [0, 1].

    Args:
      images: [N, H, W, C] or one [H, W, C], float in [0, 1] or uint8.

    Raises:
      UserError: another shape, or other values.
    """
    x = np.asarray(images)
    x = x[None] if x.ndim == 3 else x
    if x.ndim != 4 or not x.size:
        raise UserError(
            f"images have shape {np.shape(images)}: expected [N, H, W, C] with N >= 1."
        )
    if x.dtype == np.uint8:
        return x.astype(np.float32) / np.float32(255)
    x = x.astype(np.float32)
    if not (np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1):
        raise UserError(
            f"images run from {x.min():g} to {x.max():g}: expected finite floats "
            "in [0, 1] or uint8, without any normalisation (the network does it)."
        )
    return x


def as_holes(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A mask as [N, H, W, 1] bool, True where pixels may change.

    Args:
      mask: as of `inpaint`.
      shape: (N, H, W, C) of the images.

    Raises:
      UserError: another size, or no hole.
    """
    x = np.asarray(mask)
    x = x[..., None] if x.ndim == 2 else x
    x = x[None] if x.ndim == 3 else x
    allowed = [(1, *shape[1:3], 1), (*shape[:3], 1)]
    if x.shape not in allowed:
        raise UserError(
            f"mask has shape {np.shape(mask)}: expected [H, W] = "
            f"[{shape[1]}, {shape[2]}], or one for each of {shape[0]} images."
        )
    x = x > {"b": 0, "u": 127}.get(x.dtype.kind, 0.5)
    if not x.any(axis=(1, 2, 3)).all():
        raise UserError("mask has no hole: True (white) is where pixels may change.")
    return np.broadcast_to(x, allowed[1])
