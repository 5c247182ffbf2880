"""The two objectives on a network of two layers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from atebm_jax import UserError, ascent, attacks, energy, losses, models, stages

SHAPE = (6, 6, 3)
NETWORK = reference.TwoLayers()
WEIGHTS = reference.random_variables(NETWORK, SHAPE)
BATCH = reference.random_batch(5, SHAPE, NETWORK.num_classes)
LOGITS_FN = jax.jit(models.logits_fn(NETWORK, WEIGHTS))


def stage(name, **settings):
    return stages.STAGES[name].build(NETWORK, reference.stage_config(name, **settings))


def adversaries(chosen, num_steps=0):
    extra = chosen.init(None, SHAPE)
    if "ood" in chosen.streams:
        extra = replace(extra, num_steps=jnp.int32(num_steps))
    return jax.jit(chosen.adversaries)(None, WEIGHTS, extra, BATCH)


def losses_of(chosen, made):
    total, (batch_stats, figures) = jax.jit(chosen.loss)(
        WEIGHTS["params"], WEIGHTS["batch_stats"], BATCH, made
    )
    return total, batch_stats, chosen.statistics(figures)


@pytest.fixture(scope="module")
def made():
    """What stage 2 makes in three contrastive steps."""
    return adversaries(stage("stage2"), 3)


def test_stages_name_the_streams_they_take():
    assert stage("stage1").streams == ("cls",)
    assert stage("stage2").streams == ("gen", "cls", "ood")


def test_contrastive_images_climb_to_the_labels_of_the_generative_batch(made):
    before, after = (
        energy.score(LOGITS_FN(x), BATCH["y_gen"])
        for x in (BATCH["x_ood"], made["x_contrastive"])
    )
    assert (after > before).all()


def test_marginal_contrastive_images_climb_the_marginal_score():
    marginal = stage("stage2", contrastive_objective="marginal")
    climbed = adversaries(marginal, 3)["x_contrastive"]
    assert (
        energy.score(LOGITS_FN(climbed)) > energy.score(LOGITS_FN(BATCH["x_ood"]))
    ).all()


def test_without_steps_the_contrastive_images_are_the_seeds():
    chosen = stage("stage2")
    made = adversaries(chosen, 0)
    np.testing.assert_array_equal(made["x_contrastive"], BATCH["x_ood"])
    assert made["travel"] == 0
    _, _, figures = losses_of(chosen, made)
    assert figures["auc"] == figures["auc_seeds"]
    np.testing.assert_allclose(
        figures["score_contrastive"], figures["score_seeds"], rtol=1e-6
    )


def test_travel_is_a_share_of_the_longest_way(made):
    moved = ascent.l2_norm(made["x_contrastive"] - BATCH["x_ood"])
    np.testing.assert_allclose(made["travel"], moved.mean() / 0.3, rtol=1e-5)
    assert 0 < made["travel"] <= 1 + 1e-6


def test_classifier_adversary_raises_its_loss_inside_the_ball(made):
    before, after = (
        losses.cross_entropy(LOGITS_FN(x), BATCH["y_cls"])
        for x in (BATCH["x_cls"], made["x_adv"])
    )
    assert (after > before).all()
    assert ascent.l2_norm(made["x_adv"] - BATCH["x_cls"]).max() <= 0.5 + 1e-6


def test_both_stages_attack_the_classifier_alike(made):
    x_adv = adversaries(stage("stage1"))["x_adv"]
    np.testing.assert_allclose(x_adv, made["x_adv"], rtol=0, atol=1e-6)


def test_loss_is_the_weighted_sum_of_its_terms(made):
    weights = {"weight_ce": 2.0, "weight_bce": 3.0, "weight_r1": 0.5}
    total, _, figures = losses_of(stage("stage2", **weights), made)
    expected = (
        2.0 * figures["loss_ce"] + 3.0 * figures["loss_bce"] + 0.5 * figures["r1"]
    )
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    # Each term by itself, in a pass of its own.
    real, contrastive = (
        energy.score(LOGITS_FN(x)) for x in (BATCH["x_gen"], made["x_contrastive"])
    )
    np.testing.assert_allclose(
        figures["loss_bce"], losses.contrastive_bce(real, contrastive), rtol=1e-5
    )
    cross_entropy = losses.cross_entropy(LOGITS_FN(made["x_adv"]), BATCH["y_cls"])
    np.testing.assert_allclose(figures["loss_ce"], cross_entropy.mean(), rtol=1e-5)
    for name, scores in (("score_real", real), ("score_contrastive", contrastive)):
        np.testing.assert_allclose(figures[name], scores.mean(), rtol=1e-5)


def test_r1_is_computed_only_when_it_is_wanted(made):
    total, _, figures = losses_of(stage("stage2"), made)
    assert "r1" not in figures
    logged, _, figures = losses_of(stage("stage2", log_r1=True), made)
    assert figures["r1"] > 0
    np.testing.assert_allclose(logged, total, rtol=1e-6)


def test_stage2_leaves_the_running_statistics_and_trains_their_affine(made):
    chosen = stage("stage2")
    _, batch_stats, _ = losses_of(chosen, made)
    reference.assert_same_bits(batch_stats, WEIGHTS["batch_stats"])
    gradients, _ = jax.jit(jax.grad(chosen.loss, has_aux=True))(
        WEIGHTS["params"], WEIGHTS["batch_stats"], BATCH, made
    )
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradients))


def test_stage1_moves_the_running_statistics_by_the_training_pass_alone():
    chosen = stage("stage1")
    x_adv = adversaries(chosen)["x_adv"]
    total, batch_stats, figures = losses_of(chosen, {"x_adv": x_adv})
    _, expected = NETWORK.apply(WEIGHTS, x_adv, train=True, mutable=["batch_stats"])
    reference.assert_close(batch_stats, expected["batch_stats"], atol=1e-6)
    assert reference.max_difference(batch_stats, WEIGHTS["batch_stats"]) > 1e-3
    assert total == figures["loss_ce"]
    assert 0 <= figures["accuracy_adv"] <= 1


def test_published_adversary_of_stage1_is_an_option():
    settings = {"adversary.momentum": 0.9, "adversary.keep_best": True}
    made = adversaries(stage("stage1", **settings))["x_adv"]
    expected = attacks.attack(
        lambda x: losses.cross_entropy(LOGITS_FN(x), BATCH["y_cls"]),
        jnp.asarray(BATCH["x_cls"]),
        threat=attacks.l2(0.5),
        step_size=0.1,
        num_steps=10,
        momentum=0.9,
        keep_best=True,
    )
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "stage2",
            {"contrastive_objective": "joint"},
            "'joint'.*conditional, marginal",
        ),
        ("stage2", {"weight_ce": -1.0}, "stage2.weight_ce is -1"),
        ("stage2", {"weight_r1": -0.1}, "stage2.weight_r1 is -0.1"),
        ("stage1", {"adversary.norm": "l1"}, "'l1'"),
        ("stage1", {"adversary.epsilon": 0.0}, "epsilon is 0.0"),
        ("stage1", {"adversary.num_steps": -1}, "adversary.num_steps is -1"),
        ("stage2", {"adversary.momentum": 1.0}, "adversary.momentum 1.0"),
    ],
)
def test_stage_that_makes_no_sense_is_refused(name, settings, message):
    with pytest.raises(UserError, match=message):
        stage(name, **settings)
