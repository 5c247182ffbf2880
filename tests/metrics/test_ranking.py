"""Accuracy, AUROC, average precision and the false positive rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atebm_jax import metrics


def area(positive, negative):
    arrays = (jnp.asarray(x, jnp.float32) for x in (positive, negative))
    return float(metrics.auroc(*arrays))


def test_auroc_of_hand_worked_scores():
    # Of the six pairs four are won and one is a tie.
    assert area([3.0, 1.0], [0.0, 1.0, 2.0]) == pytest.approx(4.5 / 6)


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [([1, 2], [0], 1.0), ([0], [1, 2], 0.0), ([1], [0], 1.0), ([2, 2], [2] * 5, 0.5)],
)
def test_auroc_of_separated_and_constant_scores(positive, negative, expected):
    assert area(positive, negative) == expected


@pytest.mark.parametrize("levels", [3, 10, 10**6])
def test_auroc_equals_the_area_by_scikit_learn(levels):
    roc = pytest.importorskip("sklearn.metrics").roc_auc_score
    rng = np.random.default_rng(levels)
    positive = np.float32(rng.integers(0, levels, 40))
    negative = np.float32(rng.integers(0, levels, 90) - levels / 8)
    truth = np.repeat([1, 0], [40, 90])
    expected = roc(truth, np.concatenate([positive, negative]))
    assert area(positive, negative) == pytest.approx(expected, abs=1e-6)


def test_auroc_only_sees_the_order_and_turns_round_with_it():
    positive, negative = np.random.default_rng(0).normal(size=(2, 30))
    value = area(positive, negative)
    assert area(np.exp(positive), np.exp(negative)) == value
    assert area(negative, positive) == pytest.approx(1 - value, abs=1e-6)


@pytest.mark.parametrize("place", [0, 1])
def test_auroc_of_a_broken_score_is_nan(place):
    scores = [jnp.asarray([0.0, 1.0]), jnp.asarray([2.0, 3.0])]
    scores[place] = scores[place].at[0].set(jnp.nan)
    assert np.isnan(metrics.auroc(*scores))


def test_infinite_scores_have_an_order():
    assert area([np.inf, 0.0], [-np.inf, np.inf]) == pytest.approx(2.5 / 4)


def test_perfect_area_is_exactly_one_whatever_the_numbers():
    for number in (1, 3, 30, 49, 77):
        area = metrics.auroc(jnp.ones(number), jnp.zeros(50))
        assert float(area) == 1.0


def test_auroc_equals_the_reference(golden):
    stored = golden("detection_metrics")
    for name in sorted({key.partition("/")[0] for key in stored}):
        value = area(stored[f"{name}/in_scores"], stored[f"{name}/out_scores"])
        for judge in ("reference", "sklearn"):
            expected = float(stored[f"{name}/auroc_{judge}"])
            assert value == pytest.approx(expected, abs=1e-6), name


def test_accuracy_marks_images_whose_largest_logit_is_the_labels():
    logits = jnp.asarray([[1.0, 2.0], [3.0, 0.0], [5.0, 6.0]])
    hits = metrics.accuracy(logits, jnp.asarray([1, 1, 0]))
    np.testing.assert_array_equal(hits, [True, False, False])


@pytest.mark.parametrize("labels", [[[0], [1], [2]], [0], np.eye(3, dtype=int)])
def test_accuracy_refuses_labels_that_would_be_broadcast(labels):
    for measure in (metrics.accuracy, jax.jit(metrics.accuracy)):
        with pytest.raises(ValueError, match=r"expected \[B, K\] and \[B\]"):
            measure(np.eye(3), np.asarray(labels))


DETECTION = {
    metrics.average_precision: "aupr_average_precision_in",
    metrics.fpr_at_tpr: "fpr95_all_thresholds",
}


@pytest.mark.parametrize("metric", DETECTION, ids=lambda m: m.__name__)
def test_detection_scores_equal_the_reference(golden, metric):
    stored = golden("detection_metrics")
    for name in sorted({key.partition("/")[0] for key in stored}):
        inside, outside = stored[f"{name}/in_scores"], stored[f"{name}/out_scores"]
        expected = float(stored[f"{name}/{DETECTION[metric]}"])
        assert metric(inside, outside) == pytest.approx(expected, abs=1e-9), name
        if metric is metrics.average_precision:
            expected = float(stored[f"{name}/aupr_average_precision_out"])
            assert metric(-outside, -inside) == pytest.approx(expected, abs=1e-9)


def test_average_precision_is_worked_by_hand():
    # Ranks: in, out, in: precision 1 at the first half of the recall, then 2 / 3.
    value = metrics.average_precision(np.array([3.0, 1.0]), np.array([2.0]))
    assert value == pytest.approx((1 + 2 / 3) / 2)


def test_false_positive_rate_is_worked_by_hand():
    inside, outside = np.arange(20.0), np.array([-5.0, 0.5, 1.5, 30.0])
    # 19 of 20 stay above 1, which lets in 1.5 and 30.
    assert metrics.fpr_at_tpr(inside, outside) == 0.5
    assert metrics.fpr_at_tpr(inside, outside, 1.0) == 0.75


def test_constant_scores_detect_nothing():
    same = np.zeros(3), np.zeros(9)
    assert metrics.average_precision(*same) == pytest.approx(0.25)
    assert metrics.fpr_at_tpr(*same) == 1.0
    false_rate, true_rate = metrics.roc_curve(*same)
    assert list(false_rate) == list(true_rate) == [0.0, 1.0]


def test_infinite_scores_have_a_precision():
    assert metrics.average_precision(np.array([np.inf]), np.array([-np.inf])) == 1.0


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [([], [1.0], "at least one"), ([np.nan], [1.0], "1 scores are NaN")],
)
def test_scores_without_an_order_are_refused(positive, negative, message):
    for metric in (metrics.average_precision, metrics.fpr_at_tpr):
        with pytest.raises(ValueError, match=message):
            metric(np.array(positive), np.array(negative))


def test_a_true_positive_rate_of_zero_is_refused():
    with pytest.raises(ValueError, match="true_positive_rate is 0"):
        metrics.fpr_at_tpr(np.ones(2), np.ones(2), 0)
