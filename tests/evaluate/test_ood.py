"""Scores of out-of-distribution images, clean and attacked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from atebm_jax import metrics, models
from atebm_jax.evaluate import ood


def linear(images):
    """Logits 2 x and -x of one-pixel images."""
    x = images[:, 0, 0, :1]
    return jnp.concatenate([2 * x, -x], axis=-1)


def test_scores_are_worked_by_hand():
    images = jnp.asarray([0.0, 1.0]).reshape(2, 1, 1, 1)
    p = 1 / (1 + np.exp(-3))
    np.testing.assert_allclose(ood.max_softmax(linear, images), [0.5, p], rtol=1e-6)
    np.testing.assert_allclose(ood.max_logit(linear, images), [0.0, 2.0])
    np.testing.assert_allclose(
        ood.log_density(linear, images),
        [np.log(2), np.log(np.exp(2) + np.exp(-1))],
        rtol=1e-6,
    )
    # d/dx logsumexp(2x, -x) = 2 p - (1 - p).
    np.testing.assert_allclose(
        ood.negative_gradient_norm(linear, images), [-0.5, 1 - 3 * p], rtol=1e-5
    )


@pytest.mark.parametrize("name", ood.DETECTORS)
def test_attack_raises_the_score_in_use_inside_the_ball(name):
    detector, limits = ood.DETECTORS[name], ood.Budget(0.2, 0.05, 10)
    images = jnp.full((2, 1, 1, 1), 0.4)

    def logits(x):
        return linear(x) * x[:, 0, 0, :1]

    attacked = ood.attack(logits, images, detector, limits)
    assert (detector.score(logits, attacked) > detector.score(logits, images)).all()
    assert np.abs(attacked - images).max() <= 0.2 + 1e-6


def test_budget_follows_the_resolution():
    assert ood.budget((32, 32, 3)) == (1.0, 0.1, 20)
    assert ood.budget((256, 256, 3)) == (3.0, 1.0, 10)


@functools.cache
def programs(name):
    """Score and attack of a detector, for any weights."""
    detector, network = ood.DETECTORS[name], reference.network()

    def attack(weights, images):
        logits_fn = models.logits_fn(network, weights)
        return ood.attack(logits_fn, images, detector, ood.budget((32, 32, 3)))

    def measure(weights, images):
        return detector.score(models.logits_fn(network, weights), images)

    return jax.jit(measure), jax.jit(attack)


@pytest.mark.golden
@pytest.mark.parametrize("weights", ["wrn_state_dict", "autoattack_state_dict"])
def test_scores_and_attacks_equal_the_reference(golden, weights):
    stored = golden("ood")
    name = {"wrn_state_dict": "random_wrn", "autoattack_state_dict": "trained_wrn"}
    prefix, variables = name[weights], reference.variables(golden(weights))
    cases = {"max_softmax": "uniform_target", "log_density": "logsumexp_ascent"}
    for score, attack in cases.items():
        key = {"log_density": "logsumexp"}.get(score, score)
        measure, attack_fn = programs(score)
        inside = measure(variables, stored["in_images"])
        outside = measure(variables, stored["noise_images"])
        np.testing.assert_allclose(inside, stored[f"{prefix}/in/{key}"], atol=1e-5)
        np.testing.assert_allclose(outside, stored[f"{prefix}/clean/{key}"], atol=1e-5)
        attacked = attack_fn(variables, stored["noise_images"])
        if f"{prefix}/{attack}/x_adv" in stored:
            expected = stored[f"{prefix}/{attack}/x_adv"]
            distance = np.linalg.norm((attacked - expected).reshape(16, -1), axis=1)
            # Units that flip send single images elsewhere.
            assert np.median(distance) < 1e-4 and distance.max() < 0.2
        raised = measure(variables, attacked)
        for moment, values in {"clean": outside, "adv": raised}.items():
            area = float(metrics.auroc(inside, values))
            name_ = f"{prefix}/ood_detection_{key}_{moment}_auroc"
            assert area == pytest.approx(float(stored[name_]), abs=2e-2), name_
