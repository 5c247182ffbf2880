"""Every metric takes every real dtype, and rounds nothing of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atebm_jax import metrics

DTYPES = ["bool", "uint8", "int8", "uint16", "int32", "uint32", "int64", "uint64"]
DTYPES += ["float16", "bfloat16", "float32", "float64", "longdouble"]

ONES = np.array([0, 1, 1, 0, 1, 1])
ZEROS = np.array([0, 0, 1, 0])
LOGITS = np.array([[0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]])
FEATURES = np.array([[0, 1], [1, 1], [0, 0], [1, 0], [1, 1], [0, 1]])

# Of arrays of zeros and ones, which every dtype has.
EVERY = {
    "accuracy": lambda a: metrics.accuracy(a(LOGITS), a([1, 0, 1, 1])),
    "auroc": lambda a: metrics.auroc(a(ONES), a(ZEROS)),
    "auroc_interval": lambda a: metrics.auroc_interval(a(1), a(1), a(1)),
    "average_precision": lambda a: metrics.average_precision(a(ONES), a(ZEROS)),
    "fpr_at_tpr": lambda a: metrics.fpr_at_tpr(a(ONES), a(ZEROS)),
    "roc_curve": lambda a: metrics.roc_curve(a(ONES), a(ZEROS)),
    "risk_coverage": lambda a: metrics.risk_coverage(a(ONES), a(ONES[::-1])),
    "bootstrap_interval": lambda a: metrics.bootstrap_interval(
        lambda x: x[0], [a(ONES)], paired=False, num_resamples=9
    ),
    "jackknife_interval": lambda a: metrics.jackknife_interval(a(1), a(ONES)),
    "wilson_interval": lambda a: metrics.wilson_interval(a(1), a(1)),
    "brier_score": lambda a: metrics.brier_score(a(LOGITS), a([1, 0, 1, 1])),
    "calibration": lambda a: metrics.calibration(a(LOGITS), a([1, 0, 1, 1])),
    "reliability": lambda a: metrics.reliability(a(LOGITS), a([1, 0, 1, 1])),
    "negative_log_likelihood": lambda a: metrics.negative_log_likelihood(
        a(LOGITS), a([1, 0, 1, 1])
    ),
    "fit_temperature": lambda a: metrics.fit_temperature(a(LOGITS), a([1, 0, 1, 1])),
    "temperature_error": lambda a: metrics.temperature_error(
        a(LOGITS), a([1, 0, 1, 1]), a(1)
    ),
    "feature_statistics": lambda a: metrics.feature_statistics(a(FEATURES)),
    "moments": lambda a: metrics.Moments.of(a(FEATURES)),
    "frechet_distance": lambda a: metrics.frechet_distance(
        a([0, 1]), a(np.eye(2)), a([1, 1]), a(np.eye(2))
    ),
    "kernel_distance": lambda a: metrics.kernel_distance(a(FEATURES), a(FEATURES[:4])),
    "precision_recall": lambda a: metrics.precision_recall(
        a(FEATURES), a(FEATURES[1:])
    ),
    "inception_score": lambda a: metrics.inception_score(a(LOGITS), 2),
    "score_spread": lambda a: metrics.score_spread(a(ONES), "reference"),
    "spectral_distance": lambda a: metrics.spectral_distance(
        a(np.stack([LOGITS] * 3, axis=-1)[None]), a(np.ones((1, 4, 3, 3)))
    ),
    "psnr": lambda a: metrics.psnr(a(LOGITS), a(LOGITS[::-1])),
}


def made(value, dtype):
    return np.asarray(value).astype(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EVERY)
def test_metric_is_the_same_in_every_dtype(name, dtype):
    expected = EVERY[name](lambda value: np.asarray(value, np.float64))
    value = EVERY[name](lambda value: made(value, dtype))
    for one, other in zip(jax.tree.leaves(value), jax.tree.leaves(expected)):
        # Of float32 the confidences are float32 too.
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["uint8", "bool", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("where", [np.asarray, jnp.asarray, "traced"])
def test_perfect_area_is_one_in_every_dtype(dtype, where):
    positive, negative = np.ones(10), np.zeros(70_000)
    arrays = [made(x, dtype) for x in (positive, negative)]
    if where == "traced":
        area = jax.jit(metrics.auroc)(*arrays)
        assert area.dtype == jnp.float32
    else:
        area = metrics.auroc(*map(where, arrays))
    assert float(area) == 1.0


def test_areas_that_a_cast_would_change_are_exact():
    assert metrics.auroc(np.full(10, 5, np.uint8), np.zeros(300, np.uint8)) == 1
    assert metrics.auroc(np.array([1 - 1e-9]), np.array([1 - 1e-8])) == 1
    assert metrics.auroc([1 - 1e-9, 0.5], [1 - 1e-8]) == 0.5
    # Neighbours of which float64 has one only, and ints of no common dtype.
    big = np.array([2**63 + 1], np.uint64)
    assert metrics.auroc(big, np.array([2**63], np.uint64)) == 1
    assert metrics.auroc(big, np.array([-1], np.int64)) == 1
    assert metrics.auroc(np.array([2**53 + 1]), np.array([2.0**53])) == 1
    assert metrics.average_precision(big, np.array([2**63 - 1])) == 1
    assert metrics.fpr_at_tpr(np.array([2**60 + 1]), np.array([2**60])) == 0


@pytest.mark.parametrize("where", [np.asarray, jnp.asarray])
def test_logits_are_compared_as_they_are_wherever_labels_lie(where):
    logits = np.array([[0.5, 0.5 + 1e-9], [2**53, 2**53 - 1]])
    hits = metrics.accuracy(logits, where([1, 0]))
    assert np.asarray(hits).tolist() == [True, True]


@pytest.mark.parametrize(
    ("one", "other"),
    [("float16", "int32"), ("bfloat16", "float16"), ("bool", "uint8")],
)
def test_compiled_area_of_two_dtypes_is_exact(one, other):
    positive = made(np.array([1, 1]), one)
    negative = made(np.array([0, 1 if other == "uint8" else 2]), other)
    area = jax.jit(metrics.auroc)(positive, negative)
    assert float(area) == metrics.auroc(positive, negative)


def test_compiled_area_of_float32_is_computed_as_ever():
    """Training logs it, and T grows by it."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, 33)).astype(np.float32)

    def plain(positive, negative):
        ranked = jnp.sort(negative)
        below = jnp.searchsorted(ranked, positive, side="left")
        above = jnp.searchsorted(ranked, positive, side="right")
        wins = 0.5 * (below + above).astype(jnp.float32)
        return jnp.clip(wins.mean() / 33, 0.0, 1.0)

    assert float(jax.jit(metrics.auroc)(*scores)) == float(jax.jit(plain)(*scores))


def test_compiled_area_of_ints_without_a_common_dtype_is_refused():
    pair = np.array([-1], np.int32), np.array([3_000_000_000], np.uint32)
    assert metrics.auroc(*pair) == 0
    with pytest.raises(ValueError, match="cannot compare int32 with uint32"):
        jax.jit(metrics.auroc)(*pair)
    hits = jax.jit(metrics.accuracy)(np.eye(3), np.array([0, 1, 2**32 - 1], np.uint32))
    assert hits.tolist() == [True, True, False]


def test_numbers_that_do_not_fit_a_narrow_dtype_are_not_counted_in_it():
    counts = np.uint8(200), np.uint8(250)
    assert metrics.wilson_interval(*counts) == metrics.wilson_interval(200, 250)
    counts = np.int32(70_000), np.int32(80_000)
    expected = metrics.auroc_interval(0.75, 70_000, 80_000)
    assert metrics.auroc_interval(np.float16(0.75), *counts) == expected
    images = np.full((1, 9), 255, np.uint8)
    expected = metrics.psnr(images.astype(float), np.zeros((1, 9)))
    assert metrics.psnr(images, np.zeros_like(images)) == expected
    assert metrics.psnr(np.zeros_like(images), images) == expected
    for protocol in metrics.SCORE_PROTOCOLS:
        narrow = metrics.split_of_images(np.uint8(200), np.uint8(10), protocol)
        wide = metrics.split_of_images(200, 10, protocol)
        np.testing.assert_array_equal(narrow, wide)


@pytest.mark.parametrize("scores", [np.ones(2, complex), np.array(["a", "b"])])
def test_scores_that_are_no_real_numbers_are_refused(scores):
    for metric in (metrics.auroc, metrics.average_precision):
        with pytest.raises(ValueError, match="expected real numbers"):
            metric(scores, np.zeros(2))


def test_labels_between_two_classes_are_refused():
    with pytest.raises(ValueError, match="some labels are no whole numbers"):
        metrics.brier_score(LOGITS, np.array([0, 1, 1.5, 0]))
    with pytest.raises(ValueError, match="some labels are no whole numbers"):
        metrics.brier_score(LOGITS, np.array([0, 1, 2**64 - 1, 0], np.uint64))
