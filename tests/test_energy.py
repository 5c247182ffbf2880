"""The three readings of a classifier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atebm_jax import energy

LOGITS = jnp.asarray([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
LABELS = jnp.asarray([2, 0])


def test_readings_of_hand_worked_logits():
    np.testing.assert_allclose(energy.joint(LOGITS, LABELS), [-3.0, 0.0])
    # log(e + e^2 + e^3) and log 3.
    np.testing.assert_allclose(
        energy.marginal(LOGITS), [-3.4076059, -1.0986123], rtol=1e-6
    )
    np.testing.assert_allclose(
        energy.class_probabilities(LOGITS)[0], [0.09003057, 0.24472847, 0.66524096]
    )


def test_score_is_minus_the_energy():
    np.testing.assert_array_equal(energy.score(LOGITS), -energy.marginal(LOGITS))
    np.testing.assert_array_equal(
        energy.score(LOGITS, LABELS), -energy.joint(LOGITS, LABELS)
    )


def test_classifier_is_the_ratio_of_joint_and_marginal():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (50, 7)), jnp.float32)
    probabilities = energy.class_probabilities(logits)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-6)
    for label in range(7):
        joint = energy.joint(logits, jnp.full(50, label))
        np.testing.assert_allclose(
            jnp.exp(energy.marginal(logits) - joint), probabilities[:, label], rtol=1e-5
        )


def test_constant_added_to_the_logits_moves_energies_but_not_the_classifier():
    np.testing.assert_allclose(
        energy.marginal(LOGITS + 5.0), energy.marginal(LOGITS) - 5.0, rtol=1e-6
    )
    np.testing.assert_allclose(
        energy.class_probabilities(LOGITS + 5.0),
        energy.class_probabilities(LOGITS),
        rtol=1e-5,
    )


def test_gradient_of_the_marginal_score_is_the_classifier():
    gradient = jax.grad(lambda x: energy.score(x).sum())(LOGITS)
    np.testing.assert_allclose(
        gradient, energy.class_probabilities(LOGITS), rtol=1e-6, atol=1e-7
    )


def test_single_class_has_one_energy():
    logits = jnp.asarray([[2.5], [-1.0]])
    np.testing.assert_array_equal(
        energy.marginal(logits), energy.joint(logits, jnp.zeros(2, jnp.int32))
    )
    np.testing.assert_array_equal(energy.class_probabilities(logits), [[1.0], [1.0]])


@pytest.mark.parametrize("size", [1e4, 3e38])
def test_large_logits_stay_finite(size):
    logits = jnp.asarray([[size, -size, 0.0]])
    np.testing.assert_allclose(energy.marginal(logits), [-size], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: energy.score(x).sum())(logits)).all()


def test_energies_match_the_reference(golden):
    wrn = golden("wrn")
    logits, labels = jnp.asarray(wrn["logits_eval"]), jnp.asarray(wrn["labels"])
    np.testing.assert_allclose(energy.marginal(logits), wrn["E_x"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(energy.joint(logits, labels), wrn["E_xy"], atol=1e-5)


def test_value_of_a_class_is_its_own_and_of_no_class_none():
    values = jnp.array([[1.0, jnp.inf, -2.0], [3.0, 4.0, 5.0]])
    for labels, chosen in (((1, 0), (jnp.inf, 3.0)), ((2, 2), (-2.0, 5.0))):
        found = energy.at_labels(values, jnp.array(labels))
        np.testing.assert_array_equal(found, chosen)
    found = energy.at_labels(values, jnp.array([-1, 3]))
    assert np.isnan(found).all()
    gradient = jax.grad(lambda v: energy.at_labels(v, jnp.array([2, 0])).sum())(values)
    np.testing.assert_array_equal(gradient, [[0, 0, 1], [1, 0, 0]])


@pytest.mark.parametrize("labels", [np.uint8([5, 200]), np.int64([[5], [200]])])
def test_labels_of_any_integer_type_are_read(labels):
    values = jnp.arange(600.0).reshape(2, 300)
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_array_equal(energy.at_labels(values, labels), [5, 500])
