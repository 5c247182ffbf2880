"""Updates of stage 1 against the reference, normalisation statistics included.

The reference averages unbiased batch variances into the running ones, ours are biased
(as Flax has it): running statistics are converted exactly before they are compared.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest
import reference

from atebm_jax import stages, train_step

# What the paper's published code does, and plain PGD.
ADVERSARIES = {
    "argmin_evalattack": {"adversary.momentum": 0.9, "adversary.keep_best": True},
    "pgd_evalattack": {},
}
BATCH_SIZE = 16


@pytest.fixture(scope="module")
def weights(golden):
    return reference.variables(golden("wrn_state_dict"))


def at_step(stored, variant, step):
    prefix = f"{variant}/step{step}/"
    return {
        k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)
    }


def batch(golden, step, adversarial):
    inputs = golden("train_inputs")
    images = inputs[f"step{step}/clf_imgs"]
    return {
        "x_cls": images,
        "y_cls": inputs[f"step{step}/clf_labels"].astype(np.int32),
        "taught_x_adv": images if adversarial is None else adversarial,
        "teach": np.asarray(adversarial is not None),
    }


@pytest.fixture(scope="module", params=ADVERSARIES)
def variant(request, golden):
    """(name, stored arrays, stage, update, optimiser) of one adversary."""
    stored = golden("train_stage1")
    settings = reference.stage_config("stage1", **ADVERSARIES[request.param])
    stage = stages.STAGES["stage1"].build(reference.network(), settings)
    step_fn, optimizer = reference.jitted_step(
        reference.taught(stage),
        "sgd",
        float(stored["hyper/lr"]),
        float(stored["hyper/wd"]),
    )
    return request.param, stored, stage, step_fn, optimizer


def test_steps_match_on_the_stored_images(variant, golden, weights):
    name, stored, _, step_fn, optimizer = variant
    state = train_step.create_state(weights, optimizer)
    for step in (1, 2):
        arrays = at_step(stored, name, step)
        if "adv_imgs" not in arrays:
            assert (name, step) == ("pgd_evalattack", 2)
            return
        before = state.batch_stats
        state, metrics = step_fn(state, batch(golden, step, arrays["adv_imgs"]))
        np.testing.assert_allclose(metrics["loss"], arrays["loss"], rtol=0, atol=1e-5)
        expected = reference.variables(arrays, "state/")
        converted = reference.unbiased(state.batch_stats, before, BATCH_SIZE)
        reference.assert_close(converted, expected["batch_stats"], atol=1e-6)
        if "params" not in expected:
            continue
        reference.assert_close(state.params, expected["params"], atol=2e-6)
        # The first average copies: the reference stores none.
        wanted = reference.variables(arrays, "ema/") if step > 1 else expected
        averages = averaged_statistics(state, converted, step)
        reference.assert_close(state.average_params, wanted["params"], atol=2e-6)
        reference.assert_close(averages, wanted["batch_stats"], atol=2e-6)
        # The next step starts from the reference's weights and statistics.
        state = replace(
            state,
            params=expected["params"],
            batch_stats=expected["batch_stats"],
            average_batch_stats=expected["batch_stats"],
        )


def averaged_statistics(state, converted, step):
    """The averages, had the converted statistics entered instead of ours."""
    n = step - 1
    share = 1.0 if n == 0 else 1.0 - (1 + n) / (10 + n)
    return jax.tree.map(
        lambda average, ours, theirs: average + share * (theirs - ours),
        state.average_batch_stats,
        state.batch_stats,
        converted,
    )


@pytest.mark.parametrize("variant", ["argmin_evalattack"], indirect=True)
def test_gradients_match_on_the_stored_images(variant, golden, weights):
    name, stored, stage, _, _ = variant
    arrays = at_step(stored, name, 1)
    gradients, _ = jax.jit(jax.grad(stage.loss, has_aux=True))(
        weights["params"],
        weights["batch_stats"],
        batch(golden, 1, None),
        {"x_adv": arrays["adv_imgs"]},
    )
    expected = reference.variables(arrays, "grad/")["params"]
    reference.assert_close(gradients, expected, atol=1e-5)


def test_adversary_makes_the_images_of_the_reference(variant, golden, weights):
    name, stored, stage, _, _ = variant
    inputs = batch(golden, 1, None)
    made = jax.jit(stage.adversaries)(None, weights, (), inputs)["x_adv"]
    expected = at_step(stored, name, 1)["adv_imgs"]
    away = np.sqrt(np.square(made - expected).sum(axis=(1, 2, 3)))
    assert away.max() < 0.1 and (away < 1e-5).mean() >= 0.5, away


def test_free_run_stays_near_the_reference(variant, golden, weights):
    name, stored, _, step_fn, optimizer = variant
    state = train_step.create_state(weights, optimizer)
    for step in (1, 2):
        state, metrics = step_fn(state, batch(golden, step, None))
        expected = at_step(stored, name, step)
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=0, atol=0.02)
        if "state/fc.bias" in expected:
            params = reference.variables(expected, "state/")["params"]
            assert reference.max_difference(state.params, params) < 0.02
