"""Constraints: sets of images, and the way back to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from atebm_jax import UserError, ascent, constraints, hlo, sharding

SHAPE = (3, 4, 6, 2)
MASK = np.zeros(SHAPE[1:3], bool)
MASK[:2, 1:4] = True
RNG = np.random.default_rng(0)
IMAGES = RNG.random(SHAPE, np.float32)
SMALL = RNG.random((3, 2, 3, 2), np.float32)
# Outside of [0, 1] too, as after a step.
MOVED = RNG.normal(0.5, 0.8, SHAPE).astype(np.float32)

MAKE = {
    "l2": lambda: constraints.ball(IMAGES, 1.5),
    "linf": lambda: constraints.ball(IMAGES, 0.2, "linf"),
    "hole": lambda: constraints.inpaint(IMAGES, MASK),
    "means": lambda: constraints.superres(SMALL, 2),
    "hole and ball": lambda: constraints.together(
        constraints.inpaint(IMAGES, MASK, fill="image"), constraints.ball(IMAGES, 0.7)
    ),
}
TOLERANCE = {"rtol": 0, "atol": 2e-6}


def box_means(images):
    number, height, width, channels = images.shape
    split = np.asarray(images).reshape(number, height // 2, 2, width // 2, 2, channels)
    return split.mean((2, 4))


def l2(delta):
    return np.sqrt(np.square(delta).sum(axis=(1, 2, 3)))


FEASIBLE = {
    "l2": lambda x: (l2(x - IMAGES) <= 1.5 + 1e-5).all(),
    "linf": lambda x: (np.abs(x - IMAGES) <= 0.2 + 1e-6).all(),
    "hole": lambda x: np.array_equal(x[:, ~MASK], IMAGES[:, ~MASK]),
    "means": lambda x: np.abs(box_means(x) - SMALL).max() < 2e-6,
    "hole and ball": lambda x: (
        np.array_equal(x[:, ~MASK], IMAGES[:, ~MASK])
        and (l2(x - IMAGES) <= 0.7 + 1e-5).all()
    ),
}


@pytest.mark.parametrize("name", MAKE)
def test_projection_leads_into_the_set_and_leaves_it_alone_there(name):
    constraint = MAKE[name]()
    inside = np.asarray(constraint.project(MOVED))
    assert inside.min() >= 0 and inside.max() <= 1 and FEASIBLE[name](inside)
    np.testing.assert_allclose(constraint.project(inside), inside, **TOLERANCE)


@pytest.mark.parametrize("name", MAKE)
def test_edits_begin_in_the_set(name):
    constraint = MAKE[name]()
    start = np.asarray(constraint.start)
    assert start.shape == SHAPE and FEASIBLE[name](start)
    np.testing.assert_allclose(constraint.project(start), start, **TOLERANCE)


@pytest.mark.parametrize("name", ["hole", "means", "linf"])
def test_projection_is_the_nearest_image_of_the_set(name):
    """From it to the image is a right angle or more to every other of a convex set."""
    constraint = MAKE[name]()
    nearest = np.asarray(constraint.project(MOVED), np.float64)
    for seed in range(5):
        anywhere = np.random.default_rng(seed).random(SHAPE, np.float32)
        other = np.asarray(constraint.project(anywhere))
        angles = ((MOVED - nearest) * (other - nearest)).sum(axis=(1, 2, 3))
        assert (angles <= 1e-4).all()


def test_projection_on_a_ball_is_worked_by_hand():
    grey = np.full((2, 1, 2, 1), 0.5, np.float32)
    away = grey + np.array([0.3, 0.4], np.float32)[None, None, :, None]
    # Of length 0.5: halved in the first image, as it is in the second.
    near = constraints.ball(grey, [0.25, 1.0]).project(away)
    expected = [[0.65, 0.7], [0.8, 0.9]]
    np.testing.assert_allclose(near[:, 0, :, 0], expected, rtol=1e-5)
    square = constraints.ball(grey, 0.35, "linf").project(away)
    np.testing.assert_allclose(square[0, 0, :, 0], [0.8, 0.85], rtol=1e-6)


@pytest.mark.parametrize(
    ("pixels", "mean", "expected"),
    [
        ([0.2, 0.4, 0.6, 0.8], 0.6, [0.3, 0.5, 0.7, 0.9]),
        # White is at its end: the black three take it all.
        ([0.0, 0.0, 0.0, 1.0], 0.5, [1 / 3, 1 / 3, 1 / 3, 1.0]),
        ([0.9, 0.1, 0.5, 2.0], 1.0, [1.0, 1.0, 1.0, 1.0]),
        ([0.9, 0.1, 0.5, -1.0], 0.0, [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_projection_on_a_box_mean_is_worked_by_hand(pixels, mean, expected):
    small = np.full((1, 1, 1, 1), mean, np.float32)
    block = np.asarray(pixels, np.float32).reshape(1, 2, 2, 1)
    made = constraints.superres(small, 2).project(block)
    np.testing.assert_allclose(np.ravel(made), expected, atol=1e-6)


def test_a_hole_and_means_meet_in_rounds():
    known = np.asarray(constraints.superres(SMALL, 2).project(IMAGES))
    both = constraints.together(
        constraints.inpaint(known, MASK), constraints.superres(SMALL, 2)
    )
    made = np.asarray(both.project(MOVED))
    assert FEASIBLE["means"](made)
    np.testing.assert_allclose(made[:, ~MASK], known[:, ~MASK], atol=0.02)


@pytest.mark.parametrize("fill", constraints.FILLS)
def test_a_hole_begins_as_asked_and_in_the_same_way_beside_others(fill):
    many = constraints.inpaint(IMAGES, MASK, fill=fill, seed=3)
    one = constraints.inpaint(IMAGES[1], MASK, fill=fill, seed=3)
    np.testing.assert_array_equal(one.start[0], many.start[1])
    inside = many.start[:, MASK]
    if fill == "image":
        np.testing.assert_array_equal(inside, IMAGES[:, MASK])
    elif fill == "mean":
        means = IMAGES[:, ~MASK].mean(axis=1, keepdims=True)
        np.testing.assert_allclose(inside, np.broadcast_to(means, inside.shape), 1e-6)
    else:
        other = constraints.inpaint(IMAGES, MASK, fill=fill, seed=4)
        assert np.abs(other.start - many.start)[:, MASK].max() > 0.1
        np.testing.assert_array_equal(inside[0], inside[1])


def test_radius_of_a_denoiser_is_a_share_of_the_noise():
    ball = constraints.denoise(np.zeros((1, 5, 5, 4), np.uint8), 0.1, strength=0.5)
    assert ball.radius == pytest.approx(0.5 * 0.1 * 10)


def test_bytes_floats_and_masks_of_all_kinds_are_the_same():
    levels = np.arange(24, dtype=np.uint8).reshape(1, 4, 6, 1)
    exact = constraints.inpaint(levels.astype(np.float32) / 255, MASK)
    for mask in (MASK.astype(np.uint8) * 255, MASK[..., None].astype(np.float32)):
        made = constraints.inpaint(levels[0], mask)
        np.testing.assert_array_equal(made.start, exact.start)
        np.testing.assert_array_equal(made.hole, exact.hole)


@pytest.mark.parametrize("name", MAKE)
def test_constraint_passes_through_jit_and_vmap(name):
    """As an argument; and image by image."""
    constraint = MAKE[name]()
    expected = constraint.project(MOVED)
    jitted = jax.jit(lambda c, x: c.project(x))(constraint, MOVED)
    np.testing.assert_allclose(jitted, expected, **TOLERANCE)
    each = jax.vmap(lambda c, x: c.project(x))(constraint, MOVED)
    np.testing.assert_allclose(each, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["means", "hole and ball"])
def test_split_images_have_nothing_to_say_to_each_other(name):
    tiled = jax.tree.map(lambda a: np.concatenate([a] * 8), MAKE[name]())
    split = sharding.batched(sharding.make_mesh())
    constraint, images = jax.device_put((tiled, np.concatenate([MOVED] * 8)), split)

    def edit(constraint, images):
        return ascent.climb(
            lambda x: -jnp.square(x).sum(axis=(1, 2, 3)),
            images,
            step_size=jnp.full((len(images), 1, 1, 1), 0.1),
            num_steps=3,
            project=constraint.project,
        )

    compiled = reference.compiled(jax.jit(edit).lower(constraint, images))
    program = reference.Program(compiled.as_text())
    assert program.loop_bodies() and not hlo.collectives(program.everything())
    np.testing.assert_allclose(
        compiled(constraint, images)[:3], edit(MAKE[name](), MOVED), **TOLERANCE
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constraints.ball(IMAGES[0, 0], 1.0), r"expected \[N, H, W, C\]"),
        (lambda: constraints.ball(IMAGES * 255, 1.0), "without any normalisation"),
        (lambda: constraints.ball(IMAGES * np.nan, 1.0), "finite"),
        (lambda: constraints.ball(IMAGES, 0.0), "radius is 0: it must be positive"),
        (lambda: constraints.ball(IMAGES, np.inf), "positive and finite"),
        (lambda: constraints.ball(IMAGES, [1.0, 2.0]), "one for each of 3 images"),
        (lambda: constraints.ball(IMAGES, "far"), "expected a number"),
        (lambda: constraints.ball(IMAGES, 4.0, "linf"), "at most 1"),
        (lambda: constraints.ball(IMAGES, 1.0, "l1"), "choose one of l2, linf"),
        (lambda: constraints.inpaint(IMAGES, MASK[1:]), r"\[H, W\] = \[4, 6\]"),
        (lambda: constraints.inpaint(IMAGES, ~MASK & MASK), "no hole"),
        (lambda: constraints.inpaint(IMAGES, MASK, fill="red"), "choose one of mean"),
        (lambda: constraints.denoise(IMAGES, 0.0), "sigma is 0.0"),
        (lambda: constraints.denoise(IMAGES, 0.1, strength=-1), "strength is -1"),
        (lambda: constraints.superres(SMALL, 1), "factor is 1"),
        (lambda: constraints.superres(SMALL, 2.0), "factor is 2.0"),
        (lambda: constraints.together(), "there are 0 constraints"),
    ],
)
def test_wrong_arguments_get_one_clear_sentence(make, message):
    with pytest.raises(UserError, match=message):
        make()
