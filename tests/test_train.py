"""The loop: broken steps, rollback and giving up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from atebm_jax import UserError, checkpoint, train_step
from atebm_jax.reporting import read_metrics


def poison(monkeypatch, broken):
    """Makes loss and gradients NaN where `broken(state)` holds."""
    make = train_step.make

    def make_poisoned(stage, *arguments, **options):
        def loss(params, batch_stats, batch, made):
            value, rest = stage.loss(params, batch_stats, batch, made)
            return value * jnp.where(batch["bad"], jnp.nan, 1.0), rest

        def adversaries(variables, batch, num_steps):
            clean = {name: x for name, x in batch.items() if name != "bad"}
            return stage.adversaries(variables, clean, num_steps)

        poisoned = stage._replace(loss=loss, adversaries=adversaries)
        step = make(poisoned, *arguments, **options)
        return lambda state, batch: step(state, {**batch, "bad": broken(state)})

    monkeypatch.setattr(train_step, "make", make_poisoned)


def position(state):
    return state.step + state.data_offset


def last_state(workdir, stage="stage1"):
    folder = checkpoint.stage_folder(workdir, stage)
    step = checkpoint.steps_in(folder)[-1]
    with checkpoint.ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(folder / str(step) / "state")


def settings(**overrides):
    chosen = {"log_every_steps": 1, "max_skipped_in_row": 2, "stage1.num_steps": 10}
    return tiny.config(stages="stage1", **(chosen | overrides))


def test_single_broken_step_is_skipped_and_counted(monkeypatch, tmp_path):
    poison(monkeypatch, lambda state: position(state) == 5)
    tiny.run(settings(), tmp_path)
    state = last_state(tmp_path)
    assert int(state["skipped"]) == 1 and int(state["rollbacks"]) == 0
    assert int(state["num_averages"]) == 9
    assert [r["skipped"] for r in read_metrics(tmp_path) if "skipped" in r][-1] == 1
    jax.tree.map(lambda x: np.isfinite(x).all(), state["params"])


def test_broken_steps_in_a_row_roll_back_to_new_data(monkeypatch, tmp_path):
    poison(monkeypatch, lambda state: (position(state) >= 5) & (position(state) < 8))
    _, printed = tiny.run(settings(), tmp_path)
    state = last_state(tmp_path)
    assert int(state["rollbacks"]) == 1
    # Rolled back to step 4, going on behind the broken positions.
    assert int(state["data_offset"]) >= 3
    assert int(state["step"]) == 10
    assert "rolled back to step 4" in printed
    steps = [r["step"] for r in read_metrics(tmp_path) if "loss" in r]
    assert steps == list(range(1, 11))


def test_rollback_does_not_depend_on_what_is_logged(monkeypatch, tmp_path):
    poison(monkeypatch, lambda state: (position(state) >= 5) & (position(state) < 8))
    tiny.run(settings(log_every_steps=100), tmp_path)
    state = last_state(tmp_path)
    assert int(state["rollbacks"]) == 1 and int(state["data_offset"]) >= 3
    # The last step is always written.
    assert [r["step"] for r in read_metrics(tmp_path) if "loss" in r] == [10]


def test_rollback_before_the_first_checkpoint_starts_afresh(monkeypatch, tmp_path):
    poison(monkeypatch, lambda state: position(state) < 2)
    _, printed = tiny.run(settings(), tmp_path)
    assert "rolled back to step 0" in printed
    assert int(last_state(tmp_path)["step"]) == 10


def test_training_that_keeps_diverging_stops_with_a_clear_error(monkeypatch, tmp_path):
    poison(monkeypatch, lambda state: position(state) >= 5)
    with pytest.raises(UserError, match="keeps diverging.*after 1 rollbacks"):
        tiny.run(settings(max_rollbacks=1), tmp_path)


def test_stage2_freezes_statistics_and_carries_t_in_the_state(tmp_path):
    settings = {"stage2.auc_threshold": 0.0, "stage2.t_max": 3, "log_every_steps": 1}
    _, printed = tiny.run(tiny.config(**settings, **{"stage2.num_steps": 8}), tmp_path)
    first, second = last_state(tmp_path), last_state(tmp_path, "stage2")
    jax.tree.map(
        np.testing.assert_array_equal,
        first["average_batch_stats"],
        second["batch_stats"],
    )
    # A window of two steps and a threshold that every AUC reaches.
    assert int(second["curriculum"]["num_steps"]) == 3
    assert printed.count("stage2 step 7: T has reached its maximum") == 1
