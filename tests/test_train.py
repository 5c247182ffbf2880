"""The loop: broken steps, a dying network, rollback and giving up."""

import math
import os
import signal
import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from atebm_jax import (
    UserError,
    checkpoint,
    health,
    optim,
    sharding,
    train,
    train_step,
)
from atebm_jax.evaluate import evaluation
from atebm_jax.metric_writer import MetricWriter, read_metrics
from atebm_jax.preemption import Interrupted

make = train_step.make


def make_poisoned(stage, *arguments, **options):
    """`train_step.make` with a loss that is NaN where the batch says "bad"."""

    def loss(params, batch_stats, batch, made):
        value, rest = stage.loss(params, batch_stats, batch, made)
        return value * jnp.where(batch["bad"].any(), jnp.nan, 1.0), rest

    def adversaries(key, variables, extra, batch):
        clean = {name: x for name, x in batch.items() if name != "bad"}
        return stage.adversaries(key, variables, extra, clean)

    poisoned = stage._replace(loss=loss, adversaries=adversaries)
    return make(poisoned, *arguments, **options)


def poison(monkeypatch, positions):
    """Makes loss and gradients NaN at these positions in the data.

    A batch brings it along, so that all tests share one program.
    """
    jit_step = train.jit_step

    def jit_poisoned(step, placement, mesh):
        compiled = jit_step(step, placement, mesh)

        def dispatch(state, batch):
            position = int(state.step) + int(state.data_offset)
            bad = np.full(len(batch["y_cls"]), position in positions)
            return compiled(state, {**batch, **sharding.put_batch({"bad": bad}, mesh)})

        return dispatch

    monkeypatch.setattr(train_step, "make", make_poisoned)
    monkeypatch.setattr(train, "jit_step", jit_poisoned)


@pytest.fixture(autouse=True)
def only_the_loop(monkeypatch):
    """Evaluation and report have nothing to do with what is tested here."""
    tiny.only_the_loop(monkeypatch)


def last_state(workdir, stage="stage1"):
    folder = checkpoint.stage_folder(workdir, stage)
    step = checkpoint.steps_in(folder)[-1]
    with checkpoint.ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(folder / str(step) / "state")


def settings(**overrides):
    chosen = {"log_every_steps": 1, "max_skipped_in_row": 2, "stage1.num_steps": 10}
    return tiny.config(stages="stage1", **(chosen | overrides))


def test_single_broken_step_is_skipped_and_counted(monkeypatch, tmp_path):
    poison(monkeypatch, [5])
    tiny.run(settings(), tmp_path)
    state = last_state(tmp_path)
    assert int(state["skipped"]) == 1 and int(state["rollbacks"]) == 0
    assert int(state["num_averages"]) == 9
    assert [r["skipped"] for r in read_metrics(tmp_path) if "skipped" in r][-1] == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state["params"]))


def test_broken_steps_in_a_row_roll_back_to_new_data(monkeypatch, tmp_path):
    poison(monkeypatch, range(5, 8))
    _, printed = tiny.run(settings(), tmp_path)
    state = last_state(tmp_path)
    assert int(state["rollbacks"]) == 1
    # Rolled back to step 4, going on behind the broken positions.
    assert int(state["data_offset"]) >= 3
    assert int(state["step"]) == 10
    assert "rolled back to step 4" in printed
    steps = [r["step"] for r in read_metrics(tmp_path) if "loss" in r]
    assert steps == list(range(1, 11))


def test_signal_amid_broken_steps_does_not_say_that_all_is_saved(monkeypatch, tmp_path):
    poison(monkeypatch, range(5, 8))
    write = MetricWriter.write

    def write_and_signal(self, stage, step, metrics):
        write(self, stage, step, metrics)
        if metrics.get("skipped_in_row"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricWriter, "write", write_and_signal)
    with pytest.raises(Interrupted) as stopped:
        tiny.run(settings(max_skipped_in_row=9), tmp_path)
    assert "not saved" in stopped.value.kept
    assert checkpoint.steps_in(checkpoint.stage_folder(tmp_path, "stage1"))[-1] <= 5


def test_rollback_waits_for_a_save_that_is_under_way(monkeypatch, tmp_path):
    """The save of step 4 ends only once it is waited for, however late that is."""
    poison(monkeypatch, range(5, 8))
    waited = threading.Event()
    wait, write = checkpoint._Manager.wait_until_finished, checkpoint._write_checksums

    def wait_and_tell(self):
        if 4 in self.all_steps():
            waited.set()
        wait(self)

    def write_late(folder):
        if any(path.name.startswith("4.") for path in folder.iterdir()):
            assert waited.wait(timeout=600)
        write(folder)

    monkeypatch.setattr(checkpoint._Manager, "wait_until_finished", wait_and_tell)
    monkeypatch.setattr(checkpoint, "_write_checksums", write_late)
    _, printed = tiny.run(settings(), tmp_path)
    assert "rolled back to step 4" in printed


def test_rollback_does_not_depend_on_what_is_logged(monkeypatch, tmp_path):
    poison(monkeypatch, range(5, 8))
    tiny.run(settings(log_every_steps=100), tmp_path)
    state = last_state(tmp_path)
    assert int(state["rollbacks"]) == 1 and int(state["data_offset"]) >= 3
    # The last step is always written.
    assert [r["step"] for r in read_metrics(tmp_path) if "loss" in r] == [10]


def test_rollback_before_the_first_checkpoint_starts_afresh(monkeypatch, tmp_path):
    poison(monkeypatch, range(2))
    _, printed = tiny.run(settings(), tmp_path)
    assert "rolled back to step 0" in printed
    assert int(last_state(tmp_path)["step"]) == 10


def test_training_that_keeps_diverging_stops_with_a_clear_error(monkeypatch, tmp_path):
    poison(monkeypatch, range(5, 100))
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
    assert int(second["extra"]["num_steps"]) == 3
    assert printed.count("stage2 step 7: T has reached its maximum") == 1


def dies(monkeypatch, *, above, dying=True):
    """Shows a sign at step 12, as long as the learning rate is above a limit."""
    look = health.look

    def look_and_see(watch, metrics, setting, step):
        watch, signs = look(watch, metrics, setting, step)
        if step != 12 or metrics["learning_rate"] <= above:
            return watch, signs
        sign = health.Sign("cross_entropy", dying, step, "it is seen at step 12")
        return replace(watch, count=watch.count + 1), [*signs, sign]

    monkeypatch.setattr(health, "look", look_and_see)


def short(**overrides):
    """Fourteen steps with checkpoints at 5 and 10; the rate at step 12 is 0.011."""
    chosen = {"stage1.num_steps": 14, "stage1.checkpoint_every_steps": 5}
    chosen |= {"stage1.eval_every_steps": 0}
    return settings(**(chosen | overrides))


def without_times(workdir):
    timed = "images_per_second"
    return [{k: v for k, v in r.items() if k != timed} for r in read_metrics(workdir)]


def assert_same_state(first, second):
    jax.tree.map(np.testing.assert_array_equal, last_state(first), last_state(second))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The workdir of a short run in which nothing happens."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        tiny.only_the_loop(patch)
        tiny.run(short(), workdir)
    return workdir


@pytest.fixture(scope="module")
def died(tmp_path_factory):
    """The workdir of a run that dies at step 12, and what it printed."""
    workdir = tmp_path_factory.mktemp("died")
    with pytest.MonkeyPatch.context() as patch:
        tiny.only_the_loop(patch)
        dies(patch, above=0.01)
        _, printed = tiny.run(short(), workdir)
    return workdir, printed


def test_healthy_run_has_no_signs(undisturbed):
    records = read_metrics(undisturbed)
    assert {r["health_signs"] for r in records if "loss" in r} == {0}
    assert not [name for r in records for name in r if name.startswith("sign_")]
    assert all(r["logit_spread"] > 0 for r in records if "loss" in r)


def test_dying_network_goes_back_to_the_last_good_checkpoint(died):
    workdir, printed = died
    state = last_state(workdir)
    assert [int(state[x]) for x in ("step", "rollbacks", "data_offset")] == [14, 1, 7]
    assert printed.count("stage1 step 12: it is seen at step 12") == 1
    # Nothing followed the one of step 10 that shows it to be good.
    assert "checkpoint 10, of the dying network, is deleted" in printed
    assert "rolled back to step 5" in printed and "0.3 times" in printed


def test_learning_rate_is_smaller_after_a_rollback(died, undisturbed):
    before, after = (
        {r["step"]: r["learning_rate"] for r in read_metrics(path) if "loss" in r}
        for path in (undisturbed, died[0])
    )
    schedule = optim.schedule("cosine", peak=0.1, num_steps=14)
    for step in range(1, 15):
        usual = float(schedule(jnp.int32(step - 1)))
        np.testing.assert_allclose(before[step], usual, rtol=1e-5)
        factor = 1 if step <= 5 else 0.3
        np.testing.assert_allclose(after[step], factor * usual, rtol=1e-5)


def test_signs_are_counted_and_marked_in_the_metrics(died):
    records = read_metrics(died[0])
    counted = {r["step"]: r["health_signs"] for r in records if "loss" in r}
    assert counted == {step: int(step > 5) for step in range(1, 15)}
    marks = [r for r in records if "sign_cross_entropy" in r]
    assert marks == [
        {"stage": "stage1", "step": 5, "sign_cross_entropy": 12, "rollbacks": 1}
    ]


def test_job_that_is_killed_after_a_rollback_dies_and_goes_back_again(
    died, tmp_path, monkeypatch
):
    """Nothing is saved since, so that it starts over from before the sign."""
    dies(monkeypatch, above=0.01)
    write = MetricWriter.write

    def write_or_end(self, stage, step, values):
        if step == 8 and values["health_signs"]:
            raise KeyboardInterrupt
        write(self, stage, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "write", write_or_end)
        with pytest.raises(KeyboardInterrupt):
            tiny.run(short(), tmp_path)
    assert [r for r in read_metrics(tmp_path) if "sign_cross_entropy" in r]
    tiny.run(short(), tmp_path)
    assert_same_state(tmp_path, died[0])
    assert without_times(tmp_path) == without_times(died[0])


def test_dying_network_stops_the_job_where_asked(tmp_path, monkeypatch):
    dies(monkeypatch, above=0.01)
    with pytest.raises(UserError, match="stage1 stopped at step 12: it is seen"):
        tiny.run(short(on_dying="stop"), tmp_path)
    assert checkpoint.steps_in(checkpoint.stage_folder(tmp_path, "stage1")) == [5]
    mark = {"stage": "stage1", "step": 12, "sign_cross_entropy": 12}
    assert read_metrics(tmp_path)[-1] == mark


def test_divergence_is_a_result_where_the_config_says_so(monkeypatch, tmp_path):
    """Nothing is tried again, no dying network is kept, and no stage follows."""
    told = []
    monkeypatch.setattr(
        evaluation.Evaluation, "final", lambda self, console, said: told.append(said)
    )
    dies(monkeypatch, above=0.01)
    both = short(on_dying="report")
    both.stages = "stage1,stage2"
    _, printed = tiny.run(both, tmp_path)
    seen = "it is seen at step 12"
    assert told == [{"stage": "stage1", "step": 12, "seen": seen}]
    assert f"stage1 diverged at step 12 and ends here: {seen}" in printed
    assert checkpoint.steps_in(checkpoint.stage_folder(tmp_path, "stage1")) == [5]
    assert not checkpoint.stage_folder(tmp_path, "stage2").exists()
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records if "sign_cross_entropy" in r][-1] == 12


@pytest.mark.parametrize("chosen", [{"on_dying": "note"}, {"dying": False}])
def test_noted_sign_changes_nothing_but_the_record(
    undisturbed, tmp_path, monkeypatch, chosen
):
    """Where the config says so, and always where there is just nothing to learn."""
    dies(monkeypatch, above=0.0, dying=chosen.pop("dying", True))
    _, printed = tiny.run(short(**chosen), tmp_path)
    assert printed.count("stage1 step 12: it is seen at step 12") == 1
    assert_same_state(tmp_path, undisturbed)
    mark = {"stage": "stage1", "step": 12, "sign_cross_entropy": 12}
    assert mark in read_metrics(tmp_path)


def test_network_that_keeps_dying_stops_the_job(tmp_path, monkeypatch):
    dies(monkeypatch, above=0.0)
    with pytest.raises(UserError, match="keeps diverging, again after 1 rollbacks: it"):
        tiny.run(short(max_rollbacks=1), tmp_path)


def test_nothing_is_saved_while_signs_of_dying_count(tmp_path, monkeypatch):
    monkeypatch.setattr(health.Watch, "suspicious", lambda self: len(self.norms) == 5)
    tiny.run(short(), tmp_path)
    folder = checkpoint.stage_folder(tmp_path, "stage1")
    assert checkpoint.steps_in(folder) == [10, 14]


@pytest.mark.jobs
def test_thirty_times_the_learning_rate_is_caught_and_mended(tmp_path, monkeypatch):
    """The digits' stage 2 from a short stage 1: 0.3, then 0.09, 0.027 and so on."""
    chosen = {"model.name": "wide_resnet"}
    chosen |= {"stage1.num_steps": 60, "stage1.batch_size": 64}
    chosen |= {"stage2.num_steps": 24, "stage2.batch_size": 64}
    chosen |= {"stage2.learning_rate": 0.3, "log_every_steps": 1}
    chosen |= {f"stage{n}.eval_every_steps": 0 for n in (1, 2)}
    chosen |= {f"stage{n}.checkpoint_every_steps": 0 for n in (1, 2)}
    _, printed = tiny.run(tiny.config(**chosen), tmp_path)
    assert 1 <= int(last_state(tmp_path, "stage2")["rollbacks"]) <= 3
    assert "stage1 diverged" not in printed
    records = [r for r in read_metrics(tmp_path) if r["stage"] == "stage2"]
    marks = [v for r in records for k, v in r.items() if k.startswith("sign_")]
    assert marks and max(marks) <= 20
    ends = [r["loss_ce"] for r in records if "loss" in r][-5:]
    assert max(ends) < 0.85 * math.log(10)
