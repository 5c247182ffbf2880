"""How samples are drawn: sampler, steps, blur of the seeds, rounding to bytes."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from atebm_jax import ascent, calls
from atebm_jax.errors import UserError, check_choice

# The blur is written out, a sum of 6 sigma + 1 images along each axis.
_WIDEST_BLUR = 64
_LARGEST = float(np.finfo(np.float32).max)

#: How floats become bytes: as the published scores were made, or without their bias.
QUANTISE: dict[str, Callable[[Any], jax.Array]] = {
    "reference": lambda x: jnp.floor(x * 255.0).astype(jnp.uint8),
    "nearest": lambda x: jnp.round(x * 255.0).astype(jnp.uint8),
}


class Recipe(NamedTuple):
    """How samples are drawn: everything that decides them beside model and seeds."""

    sampler: str = "pgd"  #: as of `ascent.rule`: "pgd", "sgld(noise=0.005)"
    schedule: str = "constant"  #: of the step size, a key of `ascent.SCHEDULES`
    #: > 0; L2 pixels per step ("sgld": factor of the gradient, "sign": Linf pixels)
    step_size: float = 0.2
    num_steps: int = 35  #: >= 0
    #: an image stops where its energy, E(x, y) or without a class E(x), is this or
    #: lower; None for never
    target_energy: float | None = None
    #: standard deviation of a Gaussian blur of the seeds, pixels, 0 to 64
    smooth: float = 0.0
    seed: int = 0  #: of all noise, 0 <= seed < 2**32
    conditional: bool = True  #: draw given classes, by E(x, y), or any, by E(x)


def of_config(settings: ml_collections.ConfigDict, **given: Any) -> Recipe:
    """A recipe that has been checked.

    Args:
      settings: `config.evaluate.samples`, for what is not given.
      given: fields of `Recipe`; None is not given.

    Raises:
      UserError: as of `check`.
    """
    wanted = {k: settings[k] for k in ("sampler", "step_size", "num_steps")}
    wanted |= {k: value for k, value in given.items() if value is not None}
    made = Recipe(**wanted | {"sampler": resolved(wanted["sampler"])})
    check(made)
    return made


def resolved(text: str) -> str:
    """A sampler's text with all of its settings: "sgld" becomes "sgld(noise=0.01)".

    Different texts of one sampler become the same text, which protocols hold.

    Raises:
      UserError: as of `ascent.rule`.
    """
    ascent.rule(text)  # checks the ranges
    return calls.resolved("sampler", ascent.RULES, text)


def step_length(text: str, step_size: float) -> float:
    """L2 length of every step, pixels; infinite where gradients decide it."""
    return step_size if ascent.rule(text).by_length else math.inf


def check(recipe: Recipe) -> None:
    """Refuses values that nothing can be drawn with.

    Raises:
      UserError: names the value, what is allowed and the remedy.
    """
    ascent.rule(recipe.sampler)
    check_choice("schedule", recipe.schedule, ascent.SCHEDULES)
    number, whole = (int, float, np.number), (int, np.integer)
    size, steps = recipe.step_size, recipe.num_steps
    if not isinstance(steps, whole) or not 0 <= steps < 2**31:
        raise UserError(
            f"num_steps is {steps!r}: expected a whole number below 2**31, which must "
            "not be negative."
        )
    if not isinstance(size, number) or not 0 < size <= _LARGEST:
        raise UserError(
            f"step_size is {size!r}: expected a positive number, finite in float32."
        )
    check_seed(recipe.seed)
    smooth, target = recipe.smooth, recipe.target_energy
    if not isinstance(smooth, number) or not 0 <= smooth <= _WIDEST_BLUR:
        raise UserError(f"smooth is {smooth!r}: expected 0 to {_WIDEST_BLUR} pixels.")
    if target is not None and not (isinstance(target, number) and np.isfinite(target)):
        raise UserError(f"target_energy is {target!r}: expected a finite number.")


def check_seed(seed: int) -> None:
    """Refuses a seed that no random key can be made of."""
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise UserError(
            f"seed is {seed!r}: expected a whole number from 0 to 2**32 - 1."
        )


def check_sampler(text: str) -> None:
    """Refuses a config's sampler that does not exist, or not with these settings."""
    try:
        ascent.rule(text)
    except UserError as error:
        raise UserError(f"config.evaluate.samples.sampler: {error}") from error


def smooth(images: jax.Array, sigma: float) -> jax.Array:
    """Blurs seeds by a Gaussian; edges are continued by their last pixel.

    Args:
      images: [B, H, W, C] float32.
      sigma: standard deviation > 0, pixels.

    Returns:
      [B, H, W, C], as bright as before.
    """
    reach = max(math.ceil(3 * sigma), 1)
    weights = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / sigma))
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (1, 2):
        width = [(reach, reach) if a == axis else (0, 0) for a in range(4)]
        padded = jnp.pad(images, width, mode="edge")
        size = images.shape[axis]
        shifted = [
            weight * jax.lax.slice_in_dim(padded, k, k + size, axis=axis)
            for k, weight in enumerate(weights)
        ]
        images = sum(shifted[1:], start=shifted[0])
    return images
