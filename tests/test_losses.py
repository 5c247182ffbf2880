"""The terms of the training objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atebm_jax import losses

LOGITS = jnp.asarray([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
SCORES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9)), jnp.float32)


def test_cross_entropy_of_hand_worked_logits():
    # log(e + e^2 + e^3) - 1 and log 3: one value an image.
    values = losses.cross_entropy(LOGITS, jnp.asarray([0, 1]))
    np.testing.assert_allclose(values, [2.4076059, 1.0986123], rtol=1e-6)


def test_cross_entropy_gradient_is_probability_minus_target():
    labels = jnp.asarray([0, 1])
    gradient = jax.grad(lambda x: losses.cross_entropy(x, labels).sum())(LOGITS)
    expected = jax.nn.softmax(LOGITS) - jax.nn.one_hot(labels, 3)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_cross_entropy_of_a_single_class_is_zero():
    logits = jnp.asarray([[7.0], [-3.0]])
    values = losses.cross_entropy(logits, jnp.zeros(2, jnp.int32))
    np.testing.assert_array_equal(values, [0.0, 0.0])


def test_cross_entropy_of_a_certain_mistake_is_finite():
    value = losses.cross_entropy(jnp.asarray([[0.0, 1e4]]), jnp.asarray([0]))
    np.testing.assert_allclose(value, [1e4])


def test_distance_from_uniform_of_hand_worked_logits():
    # p = (3/4, 1/4): ln(4/3) / 2; equal logits and a single class have none.
    logits = jnp.asarray([[np.log(3.0), 0.0], [5.0, 5.0]], jnp.float32)
    values = losses.from_uniform(logits)
    np.testing.assert_allclose(values, [0.1438410, 0.0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(losses.from_uniform(jnp.asarray([[7.0]])), [0.0])


def test_contrastive_bce_of_hand_worked_scores():
    # [log(1 + e^-1) + log 2 + log(1 + e^-2) + log(1 + e^3)] / 4.
    value = losses.contrastive_bce(jnp.asarray([1.0, 0.0]), jnp.asarray([-2.0, 3.0]))
    np.testing.assert_allclose(value, 1.0454811, rtol=1e-6)


def test_contrastive_bce_of_equal_scores_of_zero_is_log_two():
    value = losses.contrastive_bce(jnp.zeros(4), jnp.zeros(4))
    np.testing.assert_allclose(value, np.log(2.0), rtol=1e-6)


def test_contrastive_bce_is_half_the_sum_of_the_two_means():
    real, made = SCORES
    means = [-jax.nn.log_sigmoid(s).mean() for s in (real, -made)]
    value = losses.contrastive_bce(real, made)
    np.testing.assert_allclose(value, 0.5 * sum(means), rtol=1e-6)


def test_contrastive_bce_raises_real_and_lowers_contrastive_scores():
    scores = SCORES
    real, made = jax.grad(losses.contrastive_bce, argnums=(0, 1))(*scores)
    assert (real < 0).all() and (made > 0).all()


def test_contrastive_bce_of_far_scores_is_finite_with_finite_gradients():
    real, made = jnp.asarray([-1e4]), jnp.asarray([1e4])
    np.testing.assert_allclose(losses.contrastive_bce(real, made), 1e4)
    gradients = jax.grad(losses.contrastive_bce, argnums=(0, 1))(real, made)
    np.testing.assert_allclose(gradients, [[-0.5], [0.5]])


def test_r1_of_a_quadratic_score_is_worked_by_hand():
    images = jnp.asarray([1.0, 2.0, 0.0, 2.0]).reshape(2, 2, 1, 1)
    # s = |x|^2, gradient 2 x, 0.5 * mean(4 * 5, 4 * 4) = 9.
    value = losses.r1(lambda x: jnp.square(x).sum(axis=(1, 2, 3)), images)
    np.testing.assert_allclose(value, 9.0)


def test_r1_is_differentiable_in_what_the_score_closes_over():
    images = jnp.ones((3, 2, 2, 1))
    # s = a * sum(x), R1 = 0.5 * 4 a^2, derivative 4 a.
    penalty = jax.grad(lambda a: losses.r1(lambda x: a * x.sum(axis=(1, 2, 3)), images))
    np.testing.assert_allclose(penalty(1.5), 6.0)


@pytest.mark.parametrize(
    "score", [lambda x: jnp.zeros(len(x)), lambda x: x[:, 0, 0, 0]]
)
def test_r1_does_not_depend_on_the_batch_size(score):
    image = jnp.full((1, 2, 2, 1), 0.3)
    np.testing.assert_allclose(
        losses.r1(score, image), losses.r1(score, jnp.tile(image, (5, 1, 1, 1)))
    )
