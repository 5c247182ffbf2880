"""Calibration errors, Brier score, likelihood and temperature."""

import numpy as np
import pytest
from scipy.special import softmax

from atebm_jax import metrics


def logits_of(*confidences):
    """Two-class logits whose softmax of class 0 is given."""
    p = np.array(confidences)
    return np.stack([np.log(p), np.log(1 - p)], axis=1)


def test_calibration_errors_are_worked_by_hand():
    # Two at 0.9 (one right), one at 0.6 (right): gaps 0.4 and 0.4.
    logits, labels = logits_of(0.9, 0.9, 0.6), np.array([0, 1, 0])
    result = metrics.calibration(logits, labels, num_bins=10)
    assert result.ece == pytest.approx(2 / 3 * 0.4 + 1 / 3 * 0.4)
    assert result.mce == pytest.approx(0.4)
    assert result.brier == pytest.approx((0.02 + 1.62 + 0.32) / 3)
    assert result.nll == pytest.approx(-np.log(0.9 * 0.1 * 0.6) / 3)


def test_calibration_errors_equal_the_reference(golden):
    stored = golden("calibration")
    for name in sorted({key.partition("/")[0] for key in stored}):
        logits, labels = stored[f"{name}/logits"], stored[f"{name}/labels"]
        for bins in (10, 15, 20, 30):
            value = metrics.reliability(logits, labels, bins).expected_error
            expected = float(stored[f"{name}/ece_{bins}bins"])
            assert value == pytest.approx(expected, abs=1e-6), (name, bins)
        diagram = metrics.reliability(logits, labels, 15)
        for field, key in (("counts", "count"), ("accuracy",) * 2, ("confidence",) * 2):
            np.testing.assert_allclose(
                getattr(diagram, field), stored[f"{name}/bins15_{key}"], atol=1e-6
            )
        value = metrics.negative_log_likelihood(logits, labels)
        assert value == pytest.approx(float(stored[f"{name}/nll"]), abs=1e-6)


def test_temperature_of_the_least_calibration_error_is_the_reference(golden):
    """Of 2,000 values of log T and 20 bins."""
    stored = golden("calibration")
    temperatures = np.exp(np.linspace(-3, 1, 2000))
    names = [k.partition("/")[0] for k in stored if k.endswith("temperature_ref")]
    assert names
    for name in names:
        logits, labels = stored[f"{name}/logits"], stored[f"{name}/labels"]
        diagrams = (metrics.reliability(logits / t, labels, 20) for t in temperatures)
        best = temperatures[np.argmin([d.expected_error for d in diagrams])]
        expected = float(stored[f"{name}/temperature_ref"])
        assert best == pytest.approx(expected, rel=1e-6), name


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_fitted_temperature_undoes_a_scaling(temperature):
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(20_000, 5))
    labels = (softmax(logits, axis=1).cumsum(axis=1) < rng.random((20_000, 1))).sum(1)
    fitted = metrics.fit_temperature(logits * temperature, labels)
    assert fitted == pytest.approx(temperature, rel=0.03)
    better = metrics.calibration(logits * temperature / fitted, labels)
    assert better.ece < 0.02


def test_temperature_is_bounded_where_every_prediction_is_right():
    fitted = metrics.fit_temperature(logits_of(0.9, 0.8), np.array([0, 0]))
    assert np.exp(-5) <= fitted < 0.1


def test_adaptive_bins_hold_the_same_number_each():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(300, 4)), rng.integers(0, 4, 300)
    diagram = metrics.reliability(logits, labels, 10, adaptive=True)
    assert diagram.counts.sum() == 300
    assert set(diagram.counts) <= {29, 30, 31}


@pytest.mark.parametrize("adaptive", [False, True])
def test_equal_confidences_share_a_bin(adaptive):
    logits, labels = np.zeros((6, 4)), np.array([0, 0, 0, 1, 2, 3])
    diagram = metrics.reliability(logits, labels, 15, adaptive=adaptive)
    assert diagram.counts.max() == 6
    assert diagram.expected_error == pytest.approx(0.25)
    assert diagram.maximum_error == pytest.approx(0.25)


def test_single_class_is_always_certain_and_right():
    result = metrics.calibration(np.array([[3.0], [-1.0]]), np.array([0, 0]))
    assert result == (0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((2, 3)), np.zeros(3, int), "shape"),
        (np.zeros((0, 3)), np.zeros(0, int), "N, K >= 1"),
        (np.full((1, 3), np.inf), np.zeros(1, int), "infinite"),
        (np.zeros((1, 3)), np.array([3]), "labels run from 3 to 3"),
    ],
)
def test_logits_that_do_not_fit_are_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        metrics.calibration(logits, labels)


def test_diagram_without_bins_is_refused():
    with pytest.raises(ValueError, match="num_bins is 0"):
        metrics.reliability(np.zeros((2, 3)), np.zeros(2, int), 0)


def test_error_of_a_temperature_is_that_of_fits_to_resampled_images():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(300, 5)) * 3
    labels = np.array([rng.choice(5, p=p) for p in softmax(logits / 1.7, axis=1)])
    fitted = metrics.fit_temperature(logits, labels)
    others = []
    for _ in range(60):
        rows = rng.integers(0, 300, 300)
        others.append(metrics.fit_temperature(logits[rows], labels[rows]))
    error = metrics.temperature_error(logits, labels, fitted)
    assert error == pytest.approx(np.std(others), rel=0.3)
    assert abs(fitted - 1.7) < 3 * error


def test_data_that_do_not_fix_a_temperature_leave_it_open():
    assert metrics.temperature_error(np.ones((3, 1)), np.zeros(3, int), 1.0) == np.inf


def test_risk_of_hand_worked_confidences():
    """Wrong, right, right, wrong from the most confident on; the last two are a tie."""
    confidence, hits = np.array([0.9, 0.2, 0.7, 0.2]), np.array([0, 1, 1, 0], bool)
    coverage, risk = metrics.risk_coverage(confidence, hits)
    np.testing.assert_allclose(coverage, [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(risk, [1.0, 1 / 2, 1.5 / 3, 2 / 4])
    again = metrics.risk_coverage(confidence[::-1], hits[::-1])
    np.testing.assert_allclose(again[1], risk)


def test_risk_ends_at_the_error_and_is_it_where_nothing_is_known():
    hits = np.random.default_rng(0).random(50) < 0.7
    error = 1 - hits.mean()
    for confidence in (np.ones(50), np.arange(50.0)):
        assert metrics.risk_coverage(confidence, hits)[1][-1] == pytest.approx(error)
    np.testing.assert_allclose(metrics.risk_coverage(np.ones(50), hits)[1], error)
    # Who knows which answers are wrong leaves them to the end.
    best = metrics.risk_coverage(hits, hits)[1]
    assert (best[: hits.sum()] == 0).all() and best.mean() < error / 2
    with pytest.raises(ValueError, match="1 confidences are NaN"):
        metrics.risk_coverage(np.array([0.1, np.nan]), np.array([True, False]))
    with pytest.raises(ValueError, match=r"shape \(2,\) and hits \(1,\)"):
        metrics.risk_coverage(np.array([0.1, 0.2]), np.array([True]))
