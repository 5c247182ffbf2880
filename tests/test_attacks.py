"""Threat models and what climbs in them, on objectives whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atebm_jax import UserError, ascent, attacks

SHAPE = (6, 4, 4, 3)
IMAGES, TARGET = jnp.asarray(np.random.default_rng(0).random((2, *SHAPE), np.float32))
BOUNDED = [attacks.l2(0.5), attacks.linf(0.1)]
THREATS = [*BOUNDED, attacks.unbounded()]


def quadratic(x):
    """Concave, with its maximum at TARGET."""
    return -jnp.square(x - TARGET).sum(axis=(1, 2, 3))


def flat(x):
    return 0.0 * x.sum(axis=(1, 2, 3))


def norms(threat, delta):
    axes = (1, 2, 3)
    if threat.norm == "linf":
        return np.abs(delta).max(axis=axes)
    return np.sqrt(np.square(np.asarray(delta, np.float64)).sum(axis=axes))


def ids(threat):
    return threat.norm


def test_l2_step_is_worked_by_hand():
    images = jnp.full((1, 1, 2, 1), 0.5)
    gradient = jnp.asarray([3.0, 4.0]).reshape(1, 1, 2, 1)
    moved = attacks.attack(
        lambda x: (gradient * x).sum(axis=(1, 2, 3)),
        images,
        threat=attacks.unbounded(),
        step_size=0.1,
        num_steps=2,
    )
    np.testing.assert_allclose(moved.ravel(), [0.62, 0.66], rtol=1e-6)


def test_l2_projection_scales_the_difference_back():
    origin = jnp.zeros((1, 1, 2, 1)) + 0.5
    outside = origin + jnp.asarray([0.3, 0.4]).reshape(1, 1, 2, 1)
    projected = attacks.l2(0.25).project(outside, origin)
    np.testing.assert_allclose(projected.ravel(), [0.65, 0.7], rtol=1e-6)
    inside = attacks.l2(0.6).project(outside, origin)
    np.testing.assert_array_equal(inside, outside)


def test_clip_comes_after_the_ball():
    # Scaled to 0.5 first (0.3, 0.4), then cut at 1: the norm ends below the radius.
    origin = jnp.full((1, 1, 2, 1), 0.9)
    outside = origin + jnp.asarray([0.6, 0.8]).reshape(1, 1, 2, 1)
    projected = attacks.l2(0.5).project(outside, origin)
    np.testing.assert_array_equal(projected.ravel(), [1.0, 1.0])


def test_linf_step_is_the_sign_of_the_gradient():
    images = jnp.full((1, 1, 3, 1), 0.5)
    gradient = jnp.asarray([-1e-6, 0.0, 100.0]).reshape(1, 1, 3, 1)
    moved = attacks.attack(
        lambda x: (gradient * x).sum(axis=(1, 2, 3)),
        images,
        threat=attacks.linf(0.15),
        step_size=0.1,
        num_steps=2,
    )
    np.testing.assert_allclose(moved.ravel(), [0.35, 0.5, 0.65], rtol=1e-6)


@pytest.mark.parametrize("threat", THREATS, ids=ids)
def test_result_stays_in_the_ball_and_in_the_unit_range(threat):
    moved = attacks.attack(
        lambda x: 1e3 * quadratic(x), IMAGES, threat=threat, step_size=0.3, num_steps=9
    )
    assert (moved >= 0).all() and (moved <= 1).all()
    if threat.norm != "unbounded":
        assert (norms(threat, moved - IMAGES) <= threat.epsilon + 1e-6).all()


@pytest.mark.parametrize("threat", THREATS, ids=ids)
def test_ascent_raises_the_objective_of_every_image(threat):
    moved = attacks.attack(
        quadratic, IMAGES, threat=threat, step_size=0.01, num_steps=10
    )
    assert (quadratic(moved) > quadratic(IMAGES)).all()


@pytest.mark.parametrize("threat", THREATS, ids=ids)
def test_zero_gradient_leaves_the_images(threat):
    moved = attacks.attack(flat, IMAGES, threat=threat, step_size=0.3, num_steps=3)
    np.testing.assert_array_equal(moved, IMAGES)
    moved = attacks.attack(
        flat, IMAGES, threat=threat, step_size=0.3, num_steps=3, momentum=0.9
    )
    np.testing.assert_array_equal(moved, IMAGES)


@pytest.mark.parametrize("threat", THREATS, ids=ids)
def test_zero_steps_copy_the_images(threat):
    options = {"threat": threat, "step_size": 0.3, "num_steps": 0}
    np.testing.assert_array_equal(attacks.attack(quadratic, IMAGES, **options), IMAGES)
    for keep_best in (False, True):
        made = attacks.attack(quadratic, IMAGES, keep_best=keep_best, **options)
        np.testing.assert_array_equal(made, IMAGES)


def test_infinite_radius_equals_unbounded():
    results = [
        attacks.attack(quadratic, IMAGES, threat=threat, step_size=0.4, num_steps=5)
        for threat in (attacks.l2(float("inf")), attacks.unbounded())
    ]
    # The bounded threat forms x0 + (x - x0), which rounds.
    np.testing.assert_allclose(*results, rtol=0, atol=1e-6)


def test_l2_step_does_not_depend_on_the_size_of_the_gradient():
    results = [
        attacks.attack(
            lambda x, scale=scale: scale * quadratic(x),
            IMAGES,
            threat=attacks.unbounded(),
            step_size=0.1,
            num_steps=3,
        )
        for scale in (1e-3, 1.0, 1e6)
    ]
    np.testing.assert_allclose(results[0], results[1], atol=1e-6)
    np.testing.assert_allclose(results[2], results[1], atol=1e-6)


def test_every_image_is_attacked_on_its_own():
    options = {"threat": attacks.l2(0.5), "step_size": 0.1, "num_steps": 4}
    together = attacks.attack(quadratic, IMAGES, **options)
    alone = attacks.attack(
        lambda x: -jnp.square(x - TARGET[2:3]).sum(axis=(1, 2, 3)),
        IMAGES[2:3],
        **options,
    )
    np.testing.assert_array_equal(together[2:3], alone)


def test_ball_stays_around_the_images_when_another_start_is_given():
    threat = attacks.l2(0.3)
    start = jnp.clip(IMAGES + 0.1, 0.0, 1.0)
    around = lambda x: threat.project(x, IMAGES)
    options = {"step_size": 0.1, "project": around}
    none = ascent.climb(quadratic, start, num_steps=0, **options)
    np.testing.assert_array_equal(none, start)
    moved = ascent.climb(quadratic, start, num_steps=3, **options)
    assert (norms(threat, moved - IMAGES) <= 0.3 + 1e-6).all()


def test_number_of_steps_is_a_run_time_value():
    run = jax.jit(
        lambda n: attacks.attack(
            quadratic, IMAGES, threat=attacks.l2(0.5), step_size=0.1, num_steps=n
        )
    )
    results = [run(jnp.int32(n)) for n in range(4)]
    assert run._cache_size() == 1
    once = attacks.attack(
        quadratic, IMAGES, threat=attacks.l2(0.5), step_size=0.1, num_steps=3
    )
    np.testing.assert_allclose(results[3], once, atol=1e-6)
    assert not np.array_equal(results[2], results[3])


@pytest.mark.parametrize("threat", [BOUNDED[0], THREATS[2]], ids=ids)
def test_without_momentum_and_memory_it_is_plain_l2_pgd(threat):
    options = {"step_size": 0.1, "num_steps": 6}
    plain = attacks.attack(quadratic, IMAGES, threat, **options)
    around = lambda x: threat.project(x, IMAGES)
    rule = ascent.along(threat.direction, *ascent.velocity(0.0))
    made = ascent.climb(quadratic, IMAGES, rule, project=around, **options)
    np.testing.assert_allclose(made, plain, atol=1e-6)


def test_momentum_step_is_worked_by_hand():
    # Gradients (1, 0) then (0, 1): v2 = 0.5 (1, 0) + (0, 1), of length sqrt(1.25).
    images = jnp.full((1, 1, 2, 1), 0.3)

    def objective(x):
        first, second = x[:, 0, 0, 0], x[:, 0, 1, 0]
        return jnp.where(first < 0.35, first, second)

    moved = attacks.attack(
        objective,
        images,
        threat=attacks.unbounded(),
        step_size=0.1,
        num_steps=2,
        momentum=0.5,
    )
    length = np.sqrt(1.25)
    expected = [0.4 + 0.1 * 0.5 / length, 0.3 + 0.1 / length]
    np.testing.assert_allclose(moved.ravel(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "threat", [attacks.l2(9.0), attacks.linf(0.9), attacks.unbounded()], ids=ids
)
def test_best_iterate_is_never_worse_than_the_start_or_the_end(threat):
    # Steps far too long for the quadratic: the last iterate overshoots.
    options = {"threat": threat, "step_size": 1.0, "num_steps": 5, "momentum": 0.9}
    best = attacks.attack(quadratic, IMAGES, keep_best=True, **options)
    last = attacks.attack(quadratic, IMAGES, **options)
    assert (quadratic(best) >= quadratic(IMAGES)).all()
    assert (quadratic(best) >= quadratic(last)).all()
    assert (quadratic(best) > quadratic(last)).any()


def test_best_iterate_is_kept_per_image():
    # Only the second image can be improved by such a step.
    start = TARGET.at[1].set(0.5)
    best = attacks.attack(
        quadratic,
        start,
        threat=attacks.unbounded(),
        step_size=0.5,
        num_steps=1,
        keep_best=True,
    )
    kept = [bool((best[i] == start[i]).all()) for i in range(len(start))]
    assert kept == [True, False, True, True, True, True]


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_radius_that_is_not_positive_is_refused(norm, epsilon):
    with pytest.raises(UserError, match=f"{norm} radius epsilon"):
        attacks.threat(norm, epsilon)


def test_unknown_norm_names_the_known_ones():
    with pytest.raises(UserError, match="'l1'.*l2, linf, unbounded"):
        attacks.threat("l1", 0.5)


@pytest.mark.parametrize("norm", list(attacks.THREATS))
def test_threats_are_built_by_name(norm):
    assert attacks.threat(norm, 0.5).norm == norm
