"""Signs of a dying network, on traces made by hand and on logs of real runs."""

import dataclasses
import json
import math

import numpy as np
import pytest

from atebm_jax import health

STAGE1 = health.Setting("stage1", num_classes=10, batch_size=128)
STAGE2 = health.Setting(
    "stage2", num_classes=10, batch_size=128, t_max=50, auc_window=8, trained=True
)
DYING = {"cross_entropy", "accuracy", "logit_spread", "gradient_norm", "energy"}

# CIFAR-10, WRN-10-2, stage 2 from 600 steps of stage 1: cross-entropy, adversarial
# accuracy, spread of the logits, gradient norm, scores of real and contrastive images.
# With a learning rate of 0.01 it stumbles and recovers; with 0.03 it dies at once.
STUMBLES = [
    (1.642, 0.375, 1.341, 6.791, 3.229, 2.853),
    (1.717, 0.375, 1.325, 13.54, 3.202, 3.265),
    (1.999, 0.297, 1.232, 6.97, 3.175, 3.121),
    (1.884, 0.320, 1.123, 5.026, 2.889, 2.689),
    (1.822, 0.344, 0.973, 2.454, 2.662, 2.406),
    (1.827, 0.383, 0.917, 1.681, 2.638, 2.239),
    (1.772, 0.375, 0.959, 1.847, 2.590, 2.171),
    (1.850, 0.320, 0.922, 2.581, 2.656, 2.117),
    (1.771, 0.375, 0.918, 1.444, 2.544, 2.060),
    (1.860, 0.320, 0.898, 1.550, 2.428, 2.005),
    (1.786, 0.391, 0.884, 1.295, 2.441, 1.940),
    (1.694, 0.391, 0.928, 1.366, 2.412, 1.872),
    (1.739, 0.414, 1.011, 1.664, 2.372, 1.791),
    (1.733, 0.344, 1.069, 1.898, 2.448, 1.677),
]
DIES_AT_ONCE = [
    (1.642, 0.375, 1.341, 6.791, 3.229, 2.853),
    (2.357, 0.203, 1.217, 17.67, 3.487, 4.329),
    (3.629, 0.109, 0.957, 26.10, 4.030, 4.231),
    (5.744, 0.180, 1.278, 48.75, 5.630, 4.388),
]
# The same with a better stage 1: gradient norms of 25 and 69, all scores equal and the
# cross-entropy at ln 10 from step 9 on, for hours.
DIES_SLOWLY = [
    (1.55, 0.42, 1.5, 8.0, 3.5, 3.0),
    (1.60, 0.40, 1.5, 25.0, 3.6, 3.4),
    (1.90, 0.30, 1.3, 69.0, 4.0, 4.1),
    (2.20, 0.20, 0.9, 30.0, 3.0, 3.0),
    (2.25, 0.16, 0.5, 12.0, 1.0, 1.0),
    (2.28, 0.13, 0.2, 3.0, 0.5, 0.5),
    (2.29, 0.12, 0.1, 1.0, 0.1, 0.1),
    (2.30, 0.10, 0.05, 0.5, 0.0, 0.0),
]
DEAD = (2.3026, 0.10, 1e-6, 0.3, 0.0, 0.0)


def row(ce=1.7, accuracy=0.37, spread=1.3, norm=1.5, real=0.6, made=-1.0, **others):
    """The metrics of one step."""
    return {
        "loss_ce": ce,
        "accuracy_adv": accuracy,
        "logit_spread": spread,
        "gradient_norm": norm,
        "score_real": real,
        "score_contrastive": made,
        "skipped_in_row": 0.0,
        **others,
    }


def rows(trace):
    return [row(*values) for values in trace]


def shown(steps, setting=STAGE2, watch=None):
    """{sign: step at which it was shown} over the metrics of steps 1, 2, ..."""
    watch = health.begin(setting) if watch is None else watch
    found = {}
    for step, metrics in enumerate(steps, start=1):
        watch, signs = health.look(watch, metrics, setting, step)
        assert watch.count == len(found) + len(signs)
        found |= {sign.name: step for sign in signs}
    return found


def noisy(count, setting, *, share, accuracy, seed=0):
    """Steps with a mean cross-entropy of so many ln K; its noise as measured."""
    rng = np.random.default_rng(seed)
    images, chance = setting.batch_size, math.log(setting.num_classes)
    deviation = 0.45 * chance / math.sqrt(images)
    for _ in range(count):
        yield row(
            ce=max(rng.normal(share * chance, deviation), 0.0),
            accuracy=rng.binomial(images, accuracy) / images,
            norm=rng.lognormal(0.0, 0.5),
            spread=rng.lognormal(0.0, 0.3),
        )


# What is caught.


@pytest.mark.parametrize("trace", [DIES_AT_ONCE, DIES_SLOWLY])
def test_dead_recipe_is_caught_within_twenty_steps(trace):
    found = shown(rows([*trace, *[DEAD] * 20]))
    assert min(found.values()) <= 15
    assert {"cross_entropy", "accuracy", "logit_spread"} <= found.keys() <= DYING
    assert max(found.values()) <= 25


def test_death_after_a_long_healthy_run_is_caught():
    healthy = list(noisy(1000, STAGE2, share=0.7, accuracy=0.4))
    assert not shown(healthy)
    found = shown([*healthy, *rows([DEAD] * 20)])
    assert found["logit_spread"] == 1005
    assert found["accuracy"] <= 1010 and found["cross_entropy"] <= 1012


@pytest.mark.parametrize("size", [8, 32, 64, 128, 512])
def test_logits_without_spread_take_five_steps_whatever_the_batch(size):
    setting = health.Setting("stage1", 10, size)
    healthy = list(noisy(200, setting, share=0.4, accuracy=0.6))
    assert shown([*healthy, *rows([DEAD] * 10)], setting)["logit_spread"] == 205


@pytest.mark.parametrize("size", [4, 16, 64])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_death_in_the_first_update_of_stage2_takes_six_steps(size, classes):
    """Too few images to show that the network was better are no excuse."""
    setting = health.Setting(
        "stage2", classes, size, t_max=25, auc_window=250, trained=True
    )
    first = row(ce=0.8 * math.log(classes), accuracy=1.2 / classes)
    dead = row(*DEAD) | {"loss_ce": math.log(classes), "accuracy_adv": 1 / classes}
    assert shown([first, *[dead] * 10], setting)["logit_spread"] == 6


def test_cross_entropy_at_chance_counts_after_it_was_better():
    better, chance = [row()] * 10, [row(ce=2.31)] * 20
    assert shown([*better, *chance], STAGE1) == {"cross_entropy": 17}
    assert shown(chance * 10, STAGE1) == {}


def test_accuracy_at_chance_counts_after_it_was_better():
    better, chance = [row()] * 10, [row(accuracy=0.1)] * 20
    assert shown([*better, *chance], STAGE1) == {"accuracy": 15}
    assert shown(chance * 10, STAGE1) == {}


def test_gradient_norm_many_times_its_median_counts_if_it_stays():
    usual, large = [row(norm=2.0)] * 10, [row(norm=21.0)]
    assert shown([*usual, *large * 5], STAGE1) == {"gradient_norm": 15}
    assert shown([*usual, *large * 4, *usual, *large * 4], STAGE1) == {}
    # Of a converged network, spikes that are small by its start.
    converged = [row(norm=2.0)] * 10 + [row(norm=0.01)] * 60
    assert shown([*converged, *[row(norm=1.0)] * 20], STAGE1) == {}


@pytest.mark.parametrize("large", [{"real": 1e4}, {"made": -1e4}, {"spread": 1e4}])
def test_energies_that_run_away_count_if_they_stay(large):
    assert shown([row()] * 3 + [row(**large)] * 5) == {"energy": 8}
    assert shown([row()] * 3 + [row(**large)] * 4 + [row()] * 3) == {}
    # Energies that start large, of an imported network, say, are usual.
    imported = row(real=200.0, made=180.0)
    assert shown([imported] * 20) == {}


def test_auc_of_one_at_the_end_of_the_curriculum_is_nothing_to_learn():
    """Noise as seeds, steps too short: T at 50 in step 170, AUC 1.000 from step 80."""
    growing = [row(auc=0.93, T=k // 8) for k in range(80)]
    growing += [row(auc=1.0, T=10 + k * 40 // 90) for k in range(90)]
    assert shown(growing) == {}
    found = shown(growing + [row(auc=1.0, T=50)] * 400)
    assert found == {"auc_one": 170 + 3 * 8}


def test_auc_of_one_half_at_no_steps_is_nothing_to_learn():
    rng = np.random.default_rng(0)
    steps = [row(auc=0.5 + 0.04 * rng.normal(), T=0) for _ in range(100)]
    assert shown(steps) == {"auc_half": 24}


def test_windows_of_the_auc_are_of_a_thousand_images_at_least():
    small = health.Setting("stage2", 10, 16, t_max=5, auc_window=2, trained=True)
    assert shown([row(auc=1.0, T=5)] * 400, small) == {"auc_one": 3 * 63}


# What is left alone.


def test_healthy_starts_are_silent():
    assert shown(rows(STUMBLES)) == {}
    # Stage 1 of the same network: steps 10, 20, 30, 50, and so on.
    logged = [2.467, 2.352, 2.267, 2.125, 2.006, 1.917, 1.9, 1.863, 1.698, 1.59]
    fresh = [row(ce=ce, accuracy=0.1 + k / 40) for k, ce in enumerate(logged)]
    assert shown([step for step in fresh for _ in range(10)], STAGE1) == {}
    # Digits in their first steps, with a gradient that shrinks.
    first = [(2.48, 0.06, 2.0), (2.51, 0.02, 1.95), (2.34, 0.09, 1.8), (2.3, 0.14, 1.7)]
    digits = [row(ce=ce, accuracy=a, norm=n, spread=0.27) for ce, a, n in first]
    assert shown(digits, health.Setting("stage1", 10, 64)) == {}


def test_healthy_curriculum_is_silent():
    logged = {20: (0.89, 2), 40: (0.82, 4), 60: (0.7, 7), 80: (0.73, 8)}
    steps = [row(auc=auc, T=t) for auc, t in logged.values() for _ in range(20)]
    # Then at T_max about its threshold, and once far above it.
    steps += [row(auc=0.8, T=50)] * 200 + [row(auc=0.995, T=50)] * 20
    assert shown(steps + [row(auc=0.8, T=50)] * 50) == {}


def test_learning_from_seeds_alone_is_as_asked():
    assert (
        shown(
            [row(auc=1.0, T=0)] * 400, health.Setting("stage2", 10, 128, trained=True)
        )
        == {}
    )


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("size", [8, 128, 512])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_network_that_stays_at_chance_is_silent(classes, size, stage):
    """As a fresh one on ImageNet does for hundreds of steps."""
    setting = health.Setting(stage, classes, size)
    for share in (1.1, 1.0, 0.97):
        steps = noisy(1000, setting, share=share, accuracy=1 / classes, seed=size)
        assert shown(steps, setting) == {}


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("size", [8, 128])
def test_network_between_chance_and_better_is_silent(classes, size):
    """Where it is called neither, whatever the noise."""
    setting = health.Setting("stage1", classes, size)
    for share, odds in ((0.95, 1.5), (0.92, 2.0), (0.89, 2.5)):
        accuracy = odds / (odds + classes - 1)
        steps = noisy(2000, setting, share=share, accuracy=accuracy, seed=1)
        assert shown(steps, setting) == {}


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("size", [8, 16, 128])
def test_noise_of_a_healthy_network_is_silent(classes, size):
    setting = health.Setting("stage1", classes, size)
    accuracy = (1 + 0.5 * (classes - 1)) / classes
    assert shown(noisy(2000, setting, share=0.6, accuracy=accuracy), setting) == {}


def test_classifier_without_weight_is_not_judged():
    """docs/trouble.md has such a run: its cross-entropy rises to 15."""
    setting = health.Setting("stage2", 10, 128, classifies=False, trained=True)
    assert shown([row()] * 5 + [row(ce=15.0, accuracy=0.1)] * 50, setting) == {}


def test_single_class_has_no_chance_to_compare_with():
    setting = health.Setting("stage1", 1, 128)
    assert shown([row(ce=0.0, accuracy=1.0, spread=0.0)] * 50, setting) == {}


def test_skipped_steps_are_left_to_the_guard_for_nan():
    nan = float("nan")
    skipped = row(ce=nan, accuracy=0.1, norm=nan, real=math.inf, skipped_in_row=1.0)
    before, _ = health.look(health.begin(STAGE2), row(), STAGE2, 1)
    after, signs = health.look(before, skipped, STAGE2, 2)
    assert after == before and signs == []


def test_what_a_method_does_not_measure_is_not_watched_and_the_rest_is():
    only = {"skipped_in_row": 0.0, "gradient_norm": 1.0}
    for setting in (STAGE1, STAGE2):
        found = shown([only] * 60 + [only | {"gradient_norm": 99.0}] * 10, setting)
        assert found == {"gradient_norm": 65}
    entropy = only | {"loss_ce": 1.7}
    found = shown([entropy] * 60 + [only | {"loss_ce": 2.31}] * 20, STAGE2)
    assert found.keys() == {"cross_entropy"}


# How it is told and kept.


def test_sign_is_shown_once_with_cause_and_page():
    watch, told = health.begin(STAGE1), []
    for step, metrics in enumerate([row()] * 10 + [row(ce=2.31)] * 50, start=1):
        watch, signs = health.look(watch, metrics, STAGE1, step)
        told += signs
    (sign,) = told
    assert (sign.name, sign.dying, sign.since, watch.count) == (
        "cross_entropy",
        True,
        11,
        1,
    )
    for words in ("2.31, ln 10 = 2.3", "config.stage1.learning_rate", "A network that"):
        assert words in sign.text


def test_state_is_suspicious_before_a_sign_is_shown_but_not_at_once():
    watch, suspicious = health.begin(STAGE1), []
    for step, metrics in enumerate([row()] * 10 + [row(ce=3.0)] * 5, start=1):
        watch, _ = health.look(watch, metrics, STAGE1, step)
        suspicious.append(watch.suspicious())
    assert suspicious == [False] * 12 + [True] * 3


def test_nothing_left_to_learn_is_no_reason_not_to_save():
    watch = health.begin(STAGE2)
    for step in range(1, 40):
        watch, _ = health.look(watch, row(auc=1.0, T=50), STAGE2, step)
    assert watch.shown == ("auc_one",) and not watch.suspicious()


def test_watch_goes_on_from_any_moment_as_if_undisturbed():
    steps = rows([*DIES_SLOWLY, *[DEAD] * 12])
    steps = [step | {"auc": 0.5, "T": 0} for step in steps]
    for stop in range(len(steps)):
        watch = health.begin(STAGE2)
        for step, metrics in enumerate(steps[:stop], start=1):
            watch, _ = health.look(watch, metrics, STAGE2, step)
        stored = json.loads(json.dumps(dataclasses.asdict(watch)))
        again = health.restore(stored, STAGE2)
        for step, metrics in enumerate(steps[stop:], start=stop + 1):
            watch, signs = health.look(watch, metrics, STAGE2, step)
            again, same = health.look(again, metrics, STAGE2, step)
            assert signs == same


@pytest.mark.parametrize("stored", [None, {}, {"norms": []}, "?"])
def test_checkpoint_of_an_earlier_version_begins_a_new_watch(stored):
    assert health.restore(stored, STAGE2) == health.begin(STAGE2)
    # Of a network that is dead already, nothing is known: no false alarm.
    assert shown(rows([DEAD] * 50)) == {}


# The evidence.


def test_evidence_is_a_log_likelihood_ratio():
    """128 images at ln K, normal with means 0.92 and 1 and variance 0.2: 2.048 nats."""
    entropy = health.entropy_evidence(math.log(10), STAGE1, 0.92, 1.0)
    assert entropy == pytest.approx(2.048 / 14)
    # 0.1 right of 10 classes; odds of 2/9 against 1/9: 0.0953 - 0.1 * 0.6931 an image.
    accuracy = health.accuracy_evidence(0.1, STAGE1, 2.0, 1.0)
    assert accuracy == pytest.approx(128 * (math.log(11 / 10) - 0.1 * math.log(2)) / 14)
    # Neutral in the middle; of four times the images four times as strong.
    assert health.entropy_evidence(0.96 * math.log(10), STAGE1, 0.92, 1.0) == (
        pytest.approx(0.0, abs=1e-12)
    )
    many = health.Setting("stage1", 10, 512)
    assert health.accuracy_evidence(0.1, many, 2.0, 1.0) == pytest.approx(4 * accuracy)
