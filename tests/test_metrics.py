"""AUROC, accuracy, feature statistics and the Frechet distance."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

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


def test_frechet_distance_is_worked_by_hand():
    # 3^2 + 4^2 + (2 - 1)^2 + (3 - 5)^2 on the standard deviations.
    distance = metrics.frechet_distance(
        np.zeros(2), np.diag([4.0, 9.0]), np.array([3.0, 4.0]), np.diag([1.0, 25.0])
    )
    assert distance == pytest.approx(30.0)


def test_frechet_distance_is_symmetric_and_zero_to_itself():
    rng = np.random.default_rng(0)
    a, b = (metrics.feature_statistics(rng.normal(size=(30, 6))) for _ in range(2))
    there, back = metrics.frechet_distance(*a, *b), metrics.frechet_distance(*b, *a)
    assert there == pytest.approx(back, rel=1e-9) and there > 0
    assert metrics.frechet_distance(*a, *a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_equals_the_root_of_the_product():
    rng = np.random.default_rng(1)
    a, b = (metrics.feature_statistics(rng.normal(size=(99, 5))) for _ in range(2))
    root = scipy.linalg.sqrtm(a[1] @ b[1]).real
    expected = np.square(a[0] - b[0]).sum() + np.trace(a[1] + b[1] - 2 * root)
    assert metrics.frechet_distance(*a, *b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_points_is_that_of_their_means():
    zero = np.zeros((3, 3))
    distance = metrics.frechet_distance(np.zeros(3), zero, np.ones(3), zero)
    assert distance == pytest.approx(3.0)


def test_frechet_distances_equal_the_reference(golden):
    stored = golden("frechet")
    pairs = [k for k in stored if k.startswith("frechet_") and not k.endswith("_eigh")]
    assert len(pairs) == 9
    for key in pairs:
        a, b = (metrics.feature_statistics(stored[f"features_{x}"]) for x in key[-2:])
        distance = metrics.frechet_distance(*a, *b)
        # Sets C and Z have fewer independent rows than columns.
        deficient = bool(set(key[-2:]) & {"C", "Z"})
        tolerance = {"abs": 1e-5} if deficient else {"rel": 1e-6, "abs": 1e-9}
        assert distance == pytest.approx(float(stored[key]), **tolerance), key


def test_feature_statistics_are_mean_and_unbiased_covariance(golden):
    mean, covariance = metrics.feature_statistics(np.array([[0.0, 1.0], [2.0, 5.0]]))
    np.testing.assert_allclose(mean, [1.0, 3.0])
    np.testing.assert_allclose(covariance, [[2.0, 4.0], [4.0, 8.0]])
    stored = golden("frechet")
    for name in "ABCZE":
        mean, covariance = metrics.feature_statistics(stored[f"features_{name}"])
        np.testing.assert_allclose(mean, stored[f"mu_{name}"], atol=1e-12)
        np.testing.assert_allclose(covariance, stored[f"sigma_{name}"], atol=1e-12)


def test_single_feature_has_a_covariance_matrix():
    _, covariance = metrics.feature_statistics(np.array([[0.0], [2.0]]))
    np.testing.assert_array_equal(covariance, [[2.0]])


@pytest.mark.parametrize("shape", [(1, 4), (0, 4), (8,)])
def test_statistics_of_too_few_rows_are_refused(shape):
    with pytest.raises(ValueError, match="at least two rows"):
        metrics.feature_statistics(np.zeros(shape))
