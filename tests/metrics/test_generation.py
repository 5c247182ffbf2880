"""Frechet distance, Inception Score, KID, precision and recall."""

import numpy as np
import pytest
import scipy.linalg
import scipy.special

from atebm_jax import metrics
from atebm_jax.metrics.generation import neighbour_radii


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


def test_moments_of_parts_are_those_of_the_whole():
    features = np.random.default_rng(0).normal(size=(50, 4)) + 1e3
    merged = metrics.Moments.empty(4)
    for part in np.split(features, [1, 20, 37]):
        merged = merged.merge(metrics.Moments.of(part))
    mean, covariance = merged.statistics()
    expected = metrics.feature_statistics(features)
    np.testing.assert_allclose(mean, expected[0], rtol=1e-12)
    np.testing.assert_allclose(covariance, expected[1], rtol=1e-9, atol=1e-12)
    assert merged.number == 50


def test_moments_of_one_image_have_no_covariance():
    with pytest.raises(ValueError, match="need at least two"):
        metrics.Moments.empty(3).merge(metrics.Moments.of(np.ones((1, 3)))).statistics()
    nothing = metrics.Moments.empty(3)
    assert nothing.merge(nothing).number == 0


def test_inception_scores_equal_the_reference(golden):
    stored = golden("inception_score")
    names = sorted({key.partition("/")[0] for key in stored})
    assert len(names) == 2
    for name in names:
        logits = stored[f"{name}/logits"]
        mean, spread = metrics.inception_score(logits)
        assert mean == pytest.approx(float(stored[f"{name}/torchmetrics_mean_f64"]))
        assert spread == pytest.approx(float(stored[f"{name}/torchmetrics_std_f64"]))
        mean, spread = metrics.inception_score(logits, protocol="torch_fidelity")
        assert mean == pytest.approx(float(stored[f"{name}/torchfidelity_mean"]))
        assert spread == pytest.approx(float(stored[f"{name}/torchfidelity_std"]))


def test_inception_score_is_worked_by_hand():
    certain = np.array([[100.0, 0.0], [0.0, 100.0]])
    assert metrics.inception_score(certain, 1) == (pytest.approx(2.0), 0.0)
    assert metrics.inception_score(np.zeros((4, 3)), 2) == (pytest.approx(1.0), 0.0)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [((19, 5), {}, "N >= 20"), ((40, 5), {"protocol": "best"}, "unknown protocol")],
)
def test_scores_of_too_few_images_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        metrics.inception_score(np.zeros(shape), **options)


def test_kernel_distance_equals_the_sum_over_all_pairs():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)) + 1

    def mean_kernel(a, b, skip):
        values = [
            (x @ y / 3 + 1) ** 3
            for i, x in enumerate(a)
            for j, y in enumerate(b)
            if not (skip and i == j)
        ]
        return np.mean(values)

    expected = mean_kernel(real, real, True) + mean_kernel(fake, fake, True)
    expected -= 2 * mean_kernel(real, fake, False)
    assert metrics.kernel_distance(real, fake) == pytest.approx(expected)
    assert metrics.kernel_distance(fake, real) == pytest.approx(expected)


def test_kernel_distance_of_one_distribution_is_zero_on_average():
    rng = np.random.default_rng(1)
    values = [metrics.kernel_distance(*rng.normal(size=(2, 30, 2))) for _ in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(200)
    assert min(values) < 0


def test_precision_and_recall_equal_the_reference(golden):
    stored = golden("precision_recall")
    names = sorted({key.partition("/")[0] for key in stored})
    assert len(names) == 3
    for name in names:
        real, fake = stored[f"{name}/real_features"], stored[f"{name}/fake_features"]
        precision, recall = metrics.precision_recall(real, fake)
        assert precision == float(stored[f"{name}/precision"])
        assert recall == float(stored[f"{name}/recall"])
        radii = neighbour_radii(np.asarray(real, np.float64), 3)
        np.testing.assert_allclose(radii, stored[f"{name}/real_radii_k3"], rtol=1e-6)


def test_precision_and_recall_are_worked_by_hand():
    # Balls of radius 1 around 0, 1, 2: one of two fakes lies in them. The fakes' balls
    # have radius 8 around 1.5 and 9.5 and hold the three real points.
    real, fake = np.array([[0.0], [1.0], [2.0]]), np.array([[1.5], [9.5]])
    assert metrics.precision_recall(real, fake, 1) == (0.5, 1.0)


def test_copies_have_full_precision_and_recall():
    real = np.random.default_rng(0).normal(size=(30, 4))
    assert metrics.precision_recall(real, real.copy()) == (1.0, 1.0)
    assert metrics.precision_recall(np.zeros((9, 2)), np.zeros((5, 2))) == (1.0, 1.0)


def test_work_in_blocks_changes_nothing(monkeypatch):
    rng = np.random.default_rng(2)
    real, fake = rng.normal(size=(50, 3)), rng.normal(size=(40, 3)) + 0.5
    whole = metrics.precision_recall(real, fake), metrics.kernel_distance(real, fake)
    monkeypatch.setattr("atebm_jax.metrics.generation._ROWS_AT_ONCE", 7)
    assert metrics.precision_recall(real, fake) == whole[0]
    assert metrics.kernel_distance(real, fake) == pytest.approx(whole[1])


@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        (np.zeros((3, 2)), np.zeros((9, 2)), "N, M >= 4"),
        (np.zeros((9, 2)), np.zeros((9, 3)), "shapes"),
        (np.full((9, 2), np.nan), np.zeros((9, 2)), "NaN"),
    ],
)
def test_features_that_do_not_fit_are_refused(real, fake, message):
    with pytest.raises(ValueError, match=message):
        metrics.precision_recall(real, fake)


def test_no_neighbour_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        metrics.precision_recall(np.zeros((9, 2)), np.zeros((9, 2)), 0)
