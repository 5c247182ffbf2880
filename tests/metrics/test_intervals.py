"""Intervals of proportions, and by resampling."""

import numpy as np
import pytest

from atebm_jax import metrics


def test_wilson_interval_is_worked_by_hand():
    # 8 of 10, z = 1.96: (0.8 + 0.192 -+ 0.2478) / 1.3841.
    low, high = metrics.wilson_interval(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, 1e-4))


@pytest.mark.parametrize("hits", [0, 5])
def test_wilson_interval_of_all_or_none_is_no_point(hits):
    low, high = metrics.wilson_interval(hits, 5)
    assert 0 <= low <= hits / 5 <= high <= 1 and high - low > 0.3


@pytest.mark.parametrize(("hits", "number"), [(0, 0), (3, 2), (-1, 4)])
def test_counts_that_are_none_are_refused(hits, number):
    with pytest.raises(ValueError, match="expected 0 <= hits"):
        metrics.wilson_interval(hits, number)


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).normal(size=400)
    low, high = metrics.bootstrap_interval(np.mean, [values], paired=False)
    reach = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - reach, abs=0.02)
    assert high == pytest.approx(values.mean() + reach, abs=0.02)


def test_bootstrap_keeps_paired_rows_together():
    rows = np.arange(30)
    low, high = metrics.bootstrap_interval(
        lambda a, b: float((a == b).mean()), [rows, rows], paired=True
    )
    assert low == high == 1.0


def test_bootstrap_repeats_itself_for_a_seed():
    sets = np.random.default_rng(0).normal(size=(2, 50))

    def interval(seed):
        return metrics.bootstrap_interval(
            lambda a, b: a.mean() - b.mean(), list(sets), paired=False, seed=seed
        )

    assert interval(3) == interval(3) != interval(4)


@pytest.mark.parametrize(
    ("lengths", "paired"), [((0,), False), ((3, 4), True), ((3, 0), False)]
)
def test_rows_that_cannot_be_resampled_are_refused(lengths, paired):
    with pytest.raises(ValueError, match="at least one each"):
        metrics.bootstrap_interval(
            lambda *a: 0.0, [np.zeros(n) for n in lengths], paired=paired
        )


def test_jackknife_of_a_mean_is_the_standard_error_over_groups():
    groups = np.array([1.0, 2.0, 3.0, 6.0])
    without = [(groups.sum() - g) / 3 for g in groups]
    low, high = metrics.jackknife_interval(3.0, without)
    reach = 1.96 * groups.std(ddof=1) / 2
    assert (low, high) == (
        pytest.approx(3 - reach, 1e-3),
        pytest.approx(3 + reach, 1e-3),
    )


def test_one_group_has_no_jackknife():
    with pytest.raises(ValueError, match="two or more"):
        metrics.jackknife_interval(1.0, [1.0])


def test_interval_of_an_area_solves_its_equation():
    # At a perfect area of 100 and 100 scores: (1 - low)^2 = 1.96^2 variance(low).
    low, high = metrics.auroc_interval(1.0, 100, 100)
    share = (1 - low) / (2 - low) + low / (1 + low)
    variance = low * (1 - low) * (1 + 99 * share) / 100**2
    assert high == 1 and (1 - low) ** 2 == pytest.approx(1.959964**2 * variance)
    assert low == pytest.approx(0.98045, abs=1e-5)


@pytest.mark.parametrize("area", [0.0, 0.02, 0.5, 0.9, 1.0])
def test_interval_of_an_area_turns_round_with_it_and_is_no_point(area):
    low, high = metrics.auroc_interval(area, 40, 40)
    assert 0 <= low <= area <= high <= 1 and high - low > 0.02
    turned = metrics.auroc_interval(1 - area, 40, 40)
    assert turned == (pytest.approx(1 - high), pytest.approx(1 - low))


def test_interval_of_an_area_covers_it_where_resampling_does_not():
    """Scores of N(3, 1) and N(0, 1): the area is 0.983; resampling covers 83 %."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        positive, negative = rng.normal(3, 1, 100), rng.normal(0, 1, 100)
        area = (positive[:, None] > negative[None, :]).mean()
        low, high = metrics.auroc_interval(area, 100, 100)
        hits += low <= 0.98305 <= high
    assert hits >= 0.93 * 200


@pytest.mark.parametrize(("area", "numbers"), [(1.1, (3, 3)), (0.5, (0, 3))])
def test_areas_that_are_none_are_refused(area, numbers):
    with pytest.raises(ValueError, match="an area in"):
        metrics.auroc_interval(area, *numbers)


def test_bootstrap_stays_within_bounds_and_needs_resamples():
    values = np.array([0.0, 0.0, 0.0, 0.1])
    low, _ = metrics.bootstrap_interval(
        np.mean, [values], paired=False, bounds=(0.0, 1.0)
    )
    assert low == 0.0
    with pytest.raises(ValueError, match="num_resamples is 0"):
        metrics.bootstrap_interval(np.mean, [values], paired=False, num_resamples=0)
