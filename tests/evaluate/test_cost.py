"""What evaluations cost, counted before they run."""

import pytest
import tiny

from atebm_jax.evaluate import cost


def config(**overrides):
    return tiny.config(
        **{
            "stage1.adversary.num_steps": 5,
            "stage2.adversary.num_steps": 5,
            "stage2.t_max": 10,
            "evaluate.batch_size": 40,
            "evaluate.attack.num_steps": 20,
            "evaluate.samples.num_steps": 30,
        }
        | overrides
    )


def test_passes_of_an_evaluation_are_worked_by_hand():
    # Two forward passes and 20 gradients an image, 30 gradients a sample.
    assert cost.passes_of_evaluation(config(), 80, 32) == 80 * 42 + 32 * 60
    keeping = config(**{"evaluate.attack.keep_best": True})
    assert cost.passes_of_evaluation(keeping, 80, 32) == 80 * 43 + 32 * 60


def test_batches_and_chunks_are_filled_up():
    assert cost.passes_of_evaluation(config(), 81, 33) == 120 * 42 + 64 * 60


def test_passes_of_a_training_step_are_worked_by_hand():
    # Five gradients by the image and one by the parameters.
    assert cost.passes_of_training(config(), "stage1") == 5 * 2 + 3
    # Two more images in the loss, the seeds' scores, and T gradients.
    assert cost.passes_of_training(config(), "stage2") == 5 * 2 + 3 * 3 + 1
    assert cost.passes_of_training(config(), "stage2", 7) == 20 + 7 * 2
    penalised = config(**{"stage2.weight_r1": 1.0})
    assert cost.passes_of_training(penalised, "stage2", 7) == 34 + 6


def test_speed_is_that_of_the_last_records_of_training():
    step = {"stage": "stage1", "step": 10}
    records = [step | {"images_per_second": 1.0}]
    records += [step | {"images_per_second": 100.0}] * 3
    records += [step | {"eval_clean_accuracy": 1.0}]
    assert cost.passes_per_second(config(), records) == pytest.approx(100 * 13)
    later = {"stage": "stage2", "step": 5, "T": 7.0, "images_per_second": 50.0}
    assert cost.passes_per_second(config(), [later] * 5) == pytest.approx(50 * 34)
    assert cost.passes_per_second(config(), []) is None


def test_final_evaluation_is_told_with_all_its_stages_and_a_time_once_one_is_known():
    settings = config(**{"evaluate.num_test_examples": 0})
    said = cost.of_final(settings, ["stage1", "stage2"], 80, [])
    passes = 2 * (80 * 42 + 64 * 60)
    assert "stage1 and stage2" in said and "80 images under 20 steps" in said
    assert f"50 samples of 30 steps each, {passes:,} passes" in said
    # 16 images a step, 20 + 10 x 2 passes each.
    assert f"as many as {passes / (16 * 40):,.0f} steps of stage2 at T_max" in said
    assert "estimated" not in said
    record = {"stage": "stage1", "step": 2, "images_per_second": 10.0}
    said = cost.of_final(settings, ["stage1"], 80, [record])
    assert "about 0:00:55 (estimated from training's speed)" in said


def test_periodic_evaluations_are_told_where_they_cost_over_half_of_training():
    often = config(**{"stage1.num_steps": 100, "stage1.eval_every_steps": 40})
    said = cost.of_periodic(often, "stage1", 100, 1000)
    # Three times 40 images, and 20 samples, which are a chunk of 32.
    share = 3 * (40 * 42 + 32 * 60) / (100 * 16 * 13)
    assert f"3 evaluations on the way take {share:.2g} times" in said
    assert "config.stage1.eval_every_steps" in said
    once = config(**{"stage1.num_steps": 1, "stage1.eval_every_steps": 1})
    said = cost.of_periodic(once, "stage1", 1, 1000)
    assert said.startswith("1 evaluation on the way takes ")
    rarely = config(**{"stage1.eval_every_steps": 0})
    assert cost.of_periodic(rarely, "stage1", 100, 1000) is None
