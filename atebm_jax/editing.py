"""Edits of images: energy is lowered within a constraint (paper, section 5).

An edit depends on its own image and settings alone, whatever is edited beside it.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from atebm_jax import ascent, constraints, drawing, energy, models, recipes
from atebm_jax.constraints import Constraint
from atebm_jax.errors import UserError
from atebm_jax.models import LogitsFn
from atebm_jax.recipes import Recipe

# A label for `descend`: the class that the model predicts at the start.
GUESS = -1
# A path of so many steps takes half a gigabyte a chunk.
_MOST_STEPS = 10**6
# The fewest steps that the record of a path has room for; then doubled.
_SMALLEST_RECORD = 64


class Rows(NamedTuple):
    """What is edited, one row an image."""

    constraint: Any  #: of `atebm_jax.constraints`; every array [N, ...]
    labels: Any  #: [N] int32 in 0..K-1 or `GUESS`; None to lower E(x)
    step_sizes: Any  #: [N] float32 > 0, as of the sampler


class Path(NamedTuple):
    """Readings of the model along the way of images, [T + 1, B] arrays.

    Batched functions return them as NumPy arrays [N, T + 1].
    """

    energy: Any  #: the one that is lowered: E(x, target), or E(x) without targets
    target_confidence: Any  #: p(target | x)
    original_confidence: Any  #: p(original | x)
    predicted: Any  #: the likeliest class, int32


class Edited(NamedTuple):
    """Edited images."""

    images: Any  #: [B, H, W, C] in [0, 1], in the constraint's set
    start: Any  #: [B, H, W, C], where they began
    targets: Any  #: [B] int32, the classes asked for; the originals if none was
    originals: Any  #: [B] int32, the classes that the model predicts at the start
    path: Path  #: readings before each step and at the end


def counterfactual_step_size(step_size: Any, radius: Any) -> Any:
    """Five steps or more from the centre to the edge of a ball: min(step, radius / 5).

    Args:
      step_size: that of free samples, pixels of the ball's norm; any shape.
      radius: of the ball, pixels of its norm; of a shape that broadcasts with it.
    """
    return np.minimum(step_size, radius / 5)


def descend(
    logits_fn: LogitsFn,
    constraint: Constraint,
    labels: jax.Array | None,
    keys: jax.Array,
    *,
    rule: ascent.Rule,
    step_size: jax.Array | float,
    num_steps: jax.Array | int,
    capacity: int,
    schedule: ascent.ScheduleFn = ascent.SCHEDULES["constant"],
) -> Edited:
    """Lowers the energy from `constraint.start` within the constraint's set.

    A pure function: jit it, vmap it over trees of constraints, split the images over
    devices without communication.

    Args:
      logits_fn: images [B, H, W, C] -> logits [B, K].
      constraint: of B images, one of `constraints`.
      labels: [B] int32 in 0..K-1, or `GUESS`; None to lower E(x).
      keys: [B], for rules with noise.
      rule, step_size, num_steps, schedule: as of `ascent.climb`.
      capacity: greatest number of steps, static.

    Returns:
      Images, start, classes and path of B images. The path has capacity + 1 rows; those
      beyond `num_steps` are zero.
    """
    start = constraint.start
    originals = jnp.argmax(logits_fn(start), axis=-1).astype(jnp.int32)
    targets = originals
    if labels is not None:
        targets = jnp.where(labels == GUESS, originals, labels)

    def confidence(logits: jax.Array, classes: jax.Array) -> jax.Array:
        return energy.at_labels(energy.class_probabilities(logits), classes)

    def objective(x: jax.Array) -> tuple[jax.Array, Path]:
        logits = logits_fn(x)
        score = energy.score(logits, None if labels is None else targets)
        readings = Path(
            -score,
            confidence(logits, targets),
            confidence(logits, originals),
            jnp.argmax(logits, axis=-1).astype(jnp.int32),
        )
        return score, readings

    images, path = trace(
        objective,
        start,
        rule,
        capacity=capacity,
        keys=keys,
        step_size=step_size,
        num_steps=num_steps,
        schedule=schedule,
        project=constraint.project,
    )
    return Edited(images, start, targets, originals, path)


def trace(
    objective: Callable[[jax.Array], tuple[jax.Array, Any]],
    images: jax.Array,
    rule: ascent.Rule,
    *,
    capacity: int,
    keys: jax.Array,
    step_size: jax.Array | float,
    num_steps: jax.Array | int,
    schedule: ascent.ScheduleFn,
    project: ascent.ProjectFn,
) -> tuple[jax.Array, Any]:
    """`ascent.climb` that keeps readings of the images along the way, but no images.

    Costs one evaluation of the objective more than `ascent.climb`.

    Args:
      objective: images [B, H, W, C] -> (scores [B], readings: a tree of [B] arrays).
      capacity: greatest number of steps, which sizes the record: `num_steps` may be
        traced. Readings beyond it are lost.

    Returns:
      images [B, H, W, C] and the readings, [capacity + 1, B]: row t before step t, row
      `num_steps` of the result, zeros after it.
    """
    number = jnp.asarray(num_steps, jnp.int32)
    advance = ascent.step_fn(
        objective, rule, keys, step_size, number, schedule, project
    )

    def step(t: jax.Array, carry: tuple[ascent.State, Any]) -> tuple[ascent.State, Any]:
        state, record = carry
        state, _, readings = advance(t, state)
        return state, _write(record, t, readings)

    shapes = jax.eval_shape(objective, images)[1]
    empty = jax.tree.map(lambda s: jnp.zeros((capacity + 1, *s.shape), s.dtype), shapes)
    first = (ascent.State(images, rule.init(images)), empty)
    state, record = jax.lax.fori_loop(0, number, step, first)
    return state.images, _write(record, number, objective(state.images)[1])


def _write(record: Any, row: jax.Array, readings: Any) -> Any:
    return jax.tree.map(lambda kept, new: kept.at[row].set(new), record, readings)


def check_constraint(constraint: Any, image_shape: tuple[int, ...]) -> int:
    """The number of images of a constraint for a network's images, (H, W, C).

    Raises:
      UserError: it is no constraint, or on other images.
    """
    if not isinstance(constraint, constraints.Constraint):
        raise UserError(
            f"the constraint is a {type(constraint).__name__}: expected one of "
            "atebm_jax.constraints, say constraints.ball(images, radius=2.0)."
        )
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(constraint)}
    if len(lengths) != 1:
        raise UserError("the parts of the constraint are of different lengths.")
    try:
        start = jax.eval_shape(lambda c: c.start, constraint)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the parts of the constraint do not fit together: {error}."
        ) from error
    if start.shape[1:] != image_shape or start.shape[:1] not in lengths:
        raise UserError(
            f"the constraint is on images of shape {start.shape}: this model takes [N, "
            f"{', '.join(map(str, image_shape))}]."
        )
    if not jnp.issubdtype(start.dtype, jnp.floating):
        raise UserError(
            f"the constraint is on images of {start.dtype}: expected floats in [0, 1], "
            "as constraints.as_images makes them of bytes."
        )
    return start.shape[0]


def prepare(
    constraint: Any,
    labels: np.ndarray | None,
    settings: ml_collections.ConfigDict,
    **given: Any,
) -> tuple[Rows, Recipe]:
    """Rows and recipe, with defaults for what is not given.

    Args:
      constraint, labels: as of `Rows`.
      settings: `config.evaluate.samples`, for sampler, step size (in a ball a fifth of
        the radius if that is less) and number of steps.
      given: fields of `Recipe`; None is not given. Default of the sampler: in balls
        "pgd", in linf balls "sign".

    Raises:
      UserError: a value that nothing can be edited with.
    """
    balls = constraints.balls(constraint)
    usual = given.get("step_size") is None
    longest = settings.step_size if usual else given["step_size"]
    if given.get("sampler") is None and balls:
        linf = {ball.norm for ball in balls} == {"linf"}
        given["sampler"] = "sign" if linf else "pgd"
        # The config's step size is its own sampler's, whose unit may be another.
        if usual:
            longest = recipes.step_length(settings.sampler, longest)
    recipe = recipes.of_config(settings, **given)
    if recipe.num_steps > _MOST_STEPS:
        raise UserError(
            f"num_steps is {recipe.num_steps}: every step of an edit is recorded, give "
            f"{_MOST_STEPS} at most."
        )
    number = len(jax.tree.leaves(constraint)[0])
    sizes = np.full(number, longest, np.float64)
    for ball in balls if usual else ():
        radii = np.asarray(ball.radius, np.float64)[:, 0, 0, 0]
        sizes = counterfactual_step_size(sizes, radii)
    return Rows(constraint, labels, sizes.astype(np.float32)), recipe


def edit(model: nn.Module, variables: Any, rows: Rows, recipe: Recipe) -> Edited:
    """Edits all rows, at once in memory.

    Returns:
      [N, ...] numpy arrays; those of the path are [N, T + 1].
    """
    number = len(rows.step_sizes)

    def rows_of(indices: np.ndarray) -> Rows:
        inside = np.minimum(indices, number - 1)  # fills up the last chunk
        return jax.tree.map(lambda array: np.asarray(array)[inside], rows)

    parts = [part for _, part in edit_chunks(model, variables, rows_of, recipe, number)]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def edit_chunks(
    model: nn.Module,
    variables: Any,
    rows_of: Callable[[np.ndarray], Rows],
    recipe: Recipe,
    number: int,
) -> Iterator[tuple[range, Edited]]:
    """Edits rows chunk by chunk, on all devices of this process.

    Args:
      model, variables: images to logits, and its weights.
      rows_of: indices [CHUNK] -> rows; those beyond `number` are thrown away.
      recipe: as of `prepare`.
      number: of rows.

    Yields:
      (indices of the rows, their result as numpy, the path [B, T + 1]), in order.
    """
    capacity = _SMALLEST_RECORD
    while capacity < recipe.num_steps:
        capacity *= 2
    program = _program(model, recipe.sampler, recipe.schedule, capacity)
    seed, steps = np.uint32(recipe.seed), np.int32(recipe.num_steps)
    chunks, size = range(drawing.num_chunks(number)), drawing.CHUNK
    for chunk, edited in drawing.on_devices(
        program, variables, chunks, lambda indices: (seed, steps, rows_of(indices))
    ):
        indices = range(chunk * size, min((chunk + 1) * size, number))
        # Without what fills up the record of a path, and the chunk.
        path = jax.tree.map(lambda record: record[: steps + 1].T, edited.path)
        whole = edited._replace(path=path)
        yield indices, jax.tree.map(lambda rows: rows[: len(indices)], whole)  # noqa: B023


@lru_cache
def _program(
    model: nn.Module, sampler: str, schedule: str, capacity: int
) -> Callable[..., Edited]:
    def edit(
        variables: Any, seed: jax.Array, num_steps: jax.Array, rows: Rows
    ) -> Edited:
        key = jax.random.key(seed)
        return descend(
            models.freeze(model, variables, rows.constraint.start.shape[1:]),
            rows.constraint,
            rows.labels,
            jnp.broadcast_to(key, rows.step_sizes.shape),
            rule=ascent.rule(sampler),
            step_size=rows.step_sizes[:, None, None, None],
            num_steps=num_steps,
            capacity=capacity,
            schedule=ascent.SCHEDULES[schedule],
        )

    return jax.jit(edit)
