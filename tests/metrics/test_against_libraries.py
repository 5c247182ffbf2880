"""Random scores, logits and features against scikit-learn, SciPy and brute force."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import sklearn.metrics
from scipy.special import softmax

from atebm_jax import metrics

seeds = pytest.mark.parametrize("seed", range(8))


def scores(seed):
    """Few or many levels, few or many of each kind."""
    rng = np.random.default_rng(seed)
    numbers, levels = rng.integers(1, 60, 2), 10.0 ** rng.integers(0, 5)
    sets = [np.round(rng.normal(size=n) * levels) / levels for n in numbers]
    return [np.float32(s) for s in sets]


@seeds
def test_rankings_equal_scikit_learn(seed):
    inside, outside = scores(seed)
    truth = np.repeat([1, 0], [len(inside), len(outside)])
    joined = np.concatenate([inside, outside])
    area = sklearn.metrics.roc_auc_score(truth, joined)
    ours = metrics.auroc(jnp.asarray(inside), jnp.asarray(outside))
    assert float(ours) == pytest.approx(area, abs=1e-6)
    precision = sklearn.metrics.average_precision_score(truth, joined)
    assert metrics.average_precision(inside, outside) == pytest.approx(precision)
    thresholds = np.unique(joined)[::-1]
    kept = next(t for t in thresholds if (inside >= t).mean() >= 0.95)
    assert metrics.fpr_at_tpr(inside, outside) == pytest.approx(
        (outside >= kept).mean()
    )


@seeds
def test_calibration_equals_scikit_learn_and_a_loop(seed):
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 6))
    logits = rng.normal(size=(rng.integers(1, 80), classes)) * 3
    labels = rng.integers(0, classes, len(logits))
    result = metrics.calibration(logits, labels)
    p = softmax(logits, axis=1)
    loss = sklearn.metrics.log_loss(labels, p, labels=range(classes))
    assert result.nll == pytest.approx(loss)
    hot = np.eye(classes)[labels]
    assert result.brier == pytest.approx(np.square(p - hot).sum(axis=1).mean())
    gaps = []
    for low in np.linspace(0, 1, 16)[:-1]:
        here = (p.max(1) > low) & (p.max(1) <= low + 1 / 15 + 1e-12)
        if here.any():
            right = (p.argmax(1) == labels)[here].mean()
            gaps.append((here.mean(), abs(p.max(1)[here].mean() - right)))
    assert result.ece == pytest.approx(sum(w * g for w, g in gaps), abs=1e-9)
    assert result.mce == pytest.approx(max(g for _, g in gaps), abs=1e-9)


@seeds
def test_distances_of_features_equal_scipy_and_a_loop(seed):
    rng = np.random.default_rng(seed)
    dimensions = int(rng.integers(1, 6))
    a = rng.normal(size=(dimensions + 20, dimensions)) * rng.uniform(0.1, 3)
    b = rng.normal(size=(dimensions + 30, dimensions)) + rng.normal(size=dimensions)
    first, second = metrics.feature_statistics(a), metrics.feature_statistics(b)
    root = scipy.linalg.sqrtm(first[1] @ second[1]).real
    gap = first[0] - second[0]
    expected = gap @ gap + np.trace(first[1] + second[1] - 2 * root)
    assert metrics.frechet_distance(*first, *second) == pytest.approx(expected)

    def inside(points, centres):
        apart = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        radii = np.sort(apart, axis=1)[:, 3]
        distance = np.linalg.norm(points[:, None] - centres[None], axis=-1)
        return (distance <= radii).any(axis=1).mean()

    assert metrics.precision_recall(a, b) == (inside(b, a), inside(a, b))


def test_fewer_samples_than_features_have_a_finite_distance():
    rng = np.random.default_rng(0)
    few = metrics.feature_statistics(rng.normal(size=(5, 40)))
    many = metrics.feature_statistics(rng.normal(size=(500, 40)))
    # Roots of rounding errors: as far as the reference outputs agree too.
    assert metrics.frechet_distance(*few, *few) == pytest.approx(0, abs=1e-5)
    value = metrics.frechet_distance(*few, *many)
    assert np.isfinite(value) and value > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, c: (m * np.nan, c), "NaN or infinite"),
        (lambda m, c: (m, np.full_like(c, np.inf)), "NaN or infinite"),
        (lambda m, c: (m[:2], c), "shapes"),
        (lambda m, c: (m, c[:, :2]), "shapes"),
    ],
)
def test_statistics_that_are_none_have_no_distance(change, message):
    mean, covariance = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match=message):
        metrics.frechet_distance(*change(mean, covariance), mean, covariance)


def test_empty_and_broken_input_is_refused():
    with pytest.raises(ValueError, match="at least one of each"):
        metrics.auroc(jnp.zeros(0), jnp.zeros(3))
    with pytest.raises(ValueError, match="NaN or infinite"):
        metrics.inception_score(np.full((40, 3), np.nan))
    nothing = metrics.Moments.of(np.zeros((0, 4)))
    assert nothing.merge(metrics.Moments.of(np.ones((2, 4)))).number == 2
