"""One update, on a stage whose every number is worked by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from atebm_jax import curriculum, optim, train_step
from atebm_jax.stages import Stage


def toy_loss(params, batch_stats, batch, made):
    """Half the squared distance of a weight to the target, and what the batch says."""
    square = 0.5 * jnp.square(params["w"] - batch["target"])
    # Finite itself, without a finite derivative at w = 0.
    rootlike = batch["root"] * jnp.sqrt(jnp.abs(params["w"]))
    figures = {"auc": batch["auc"], "made": made["made"]}
    return square + rootlike, ({"mean": batch_stats["mean"] + 1.0}, figures)


TOY = Stage(
    (),
    lambda key, variables, extra, batch: {"made": extra.num_steps},
    toy_loss,
    init=lambda key, image_shape: curriculum.init(1),
    update=lambda extra, metrics: curriculum.update(
        extra, metrics["auc"], threshold=0.5, max_steps=2
    ),
    shown=lambda extra: {"T": extra.num_steps},
)
OPTIMIZER = optim.sgd(weight_decay=0.0)
VARIABLES = {
    "params": {"w": jnp.float32(1.0)},
    "batch_stats": {"mean": jnp.float32(0.0)},
}
STEP = jax.jit(
    train_step.make(
        TOY,
        OPTIMIZER,
        optim.schedule("constant", peak=0.1, num_steps=10, warmup_steps=1),
    )
)


def batch(target=3.0, root=0.0, auc=0.0):
    values = {"target": target, "root": root, "auc": auc}
    return {name: jnp.float32(value) for name, value in values.items()}


@pytest.fixture
def state():
    return train_step.create_state(VARIABLES, OPTIMIZER, extra=TOY.init(None, ()))


def test_fresh_state_has_its_own_averages_and_zero_counters(state):
    reference.assert_same_bits(state.average_params, state.params)
    counters = (
        state.step,
        state.data_offset,
        state.num_averages,
        state.skipped,
        state.skipped_in_row,
        state.rollbacks,
        state.extra.num_steps,
    )
    assert [int(x) for x in counters] == [0] * 7
    assert {x.dtype for x in counters} == {jnp.dtype("int32")}
    # Donating the state needs every array once.
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)


def test_two_updates_are_worked_by_hand(state):
    first, figures = STEP(state, batch())
    # g = -2, v = -2, u = -3.8; the warm-up's rate is 0.05: 1 + 0.19.
    np.testing.assert_allclose(first.params["w"], 1.19, rtol=1e-6)
    np.testing.assert_allclose(figures["learning_rate"], 0.05, rtol=1e-6)
    np.testing.assert_allclose([figures["loss"], figures["gradient_norm"]], [2.0, 2.0])
    reference.assert_same_bits(first.average_params, first.params)
    second, _ = STEP(first, batch())
    # g = -1.81, v = -3.61, u = -5.059 at the full rate of 0.1.
    np.testing.assert_allclose(second.params["w"], 1.6959, rtol=1e-6)
    average = 1.19 * 2 / 11 + 1.6959 * 9 / 11
    np.testing.assert_allclose(second.average_params["w"], average, rtol=1e-6)
    assert second.batch_stats["mean"] == 2
    statistics = 1 * 2 / 11 + 2 * 9 / 11
    np.testing.assert_allclose(second.average_batch_stats["mean"], statistics)
    assert [int(second.step), int(second.num_averages)] == [2, 2]


@pytest.mark.parametrize(
    "broken",
    [{"target": np.nan}, {"target": np.inf}, {"target": 1e30}, {"root": 1.0}],
    ids=["nan", "inf", "overflow", "gradient_only"],
)
def test_broken_step_is_counted_and_changes_nothing_else(state, broken):
    state, _ = STEP(state, batch())
    state = replace(state, params={"w": jnp.float32(0.0)})
    after, figures = STEP(state, batch(**broken, auc=1.0))
    if broken == {"root": 1.0}:
        assert np.isfinite(figures["loss"])
        assert not np.isfinite(figures["gradient_norm"])
    changed = {"step": 2, "skipped": 1, "skipped_in_row": 1}
    for name, value in changed.items():
        assert int(getattr(after, name)) == value
    same = {name: getattr(state, name) for name in changed}
    reference.assert_same_bits(replace(after, **same), state)
    assert [int(figures["skipped"]), int(figures["skipped_in_row"])] == [1, 1]


def test_good_step_ends_the_row_of_broken_ones(state):
    for target in (np.nan, np.nan):
        state, _ = STEP(state, batch(target))
    assert [int(state.skipped), int(state.skipped_in_row)] == [2, 2]
    state, _ = STEP(state, batch())
    assert [int(state.skipped), int(state.skipped_in_row)] == [2, 0]
    assert [int(state.step), int(state.num_averages)] == [3, 1]


def test_curriculum_takes_the_auc_and_tells_the_steps_that_were_used(state):
    used = []
    for auc in (0.6, 0.4, 0.6, 0.9):
        state, figures = STEP(state, batch(auc=auc))
        assert figures["made"] == figures["T"]
        used.append(int(figures["T"]))
    assert used == [0, 1, 1, 2]
    assert int(state.extra.num_steps) == 2


def test_stage_needs_no_state_of_its_own():
    stage = Stage((), lambda key, variables, extra, batch: {"made": 0.0}, toy_loss)
    step = train_step.make(
        stage,
        OPTIMIZER,
        optim.schedule("constant", peak=1.0, num_steps=1),
    )
    before = train_step.create_state(VARIABLES, OPTIMIZER)
    after, figures = jax.jit(step)(before, batch())
    assert "T" not in figures
    assert after.extra == before.extra == ()


@pytest.mark.parametrize("parts", [1, 2])
def test_stage_that_needs_a_key_has_a_new_one_in_every_step_and_part(parts):
    def adversaries(key, variables, extra, batch):
        return {"made": jax.random.uniform(key, batch["x"].shape)}

    def loss(params, batch_stats, batch, made):
        return 0.0 * params["w"], (batch_stats, {"each": made["made"]})

    stage = Stage((), adversaries, loss, needs_key=True)
    schedule = optim.schedule("constant", peak=0.0, num_steps=1)
    step = jax.jit(train_step.make(stage, OPTIMIZER, schedule, num_micro_batches=parts))
    state = train_step.create_state(VARIABLES, OPTIMIZER)
    drawn = []
    for _ in range(2):
        state, figures = step(state, {"x": jnp.zeros(4)})
        drawn.append(np.asarray(figures["each"]))
    assert len(np.unique(drawn)) == 8
    again = step(train_step.create_state(VARIABLES, OPTIMIZER), {"x": jnp.zeros(4)})[1]
    np.testing.assert_array_equal(again["each"], drawn[0])


def test_average_variables_are_what_evaluation_takes(state):
    state, _ = STEP(state, batch())
    state, _ = STEP(state, batch())
    variables = train_step.average_variables(state)
    assert variables["params"] is state.average_params
    assert variables["batch_stats"] is state.average_batch_stats


def seen_images(batch, *, seed=0, step=0, offset=0):
    """The inputs that a stage gets from a batch."""
    stage = Stage(
        ("gen", "ood"),
        lambda key, variables, extra, batch: {},
        lambda params, batch_stats, batch, made: (
            0.0 * params["w"],
            (batch_stats, dict(batch)),
        ),
    )
    schedule = optim.schedule("constant", peak=0.0, num_steps=1)
    look = jax.jit(train_step.make(stage, OPTIMIZER, schedule, seed=seed))
    state = replace(
        train_step.create_state(VARIABLES, OPTIMIZER),
        step=jnp.int32(step),
        data_offset=jnp.int32(offset),
    )
    return look(state, batch)[1]


def test_bytes_and_floats_are_the_same_images():
    raw = np.arange(48, dtype=np.uint8).reshape(2, 4, 2, 3) * 5
    batches = [{"x_gen": x, "x_ood": x} for x in (raw, raw.astype(np.float32) / 255)]
    seen = [seen_images(batch) for batch in batches]
    for name in ("x_gen", "x_ood"):
        assert seen[0][name].dtype == jnp.float32
        np.testing.assert_allclose(seen[0][name], seen[1][name], rtol=1e-6)


def test_missing_seeds_are_noise_by_seed_and_data_position():
    images = {"x_gen": np.zeros((4, 3, 3, 1), np.float32)}
    noise = seen_images(images, step=3)["x_ood"]
    assert noise.shape == (4, 3, 3, 1)
    assert (noise >= 0).all() and (noise < 1).all()
    assert len(np.unique(noise)) == noise.size
    # A rollback moves the offset: the same data position is the same noise.
    same = seen_images(images, step=1, offset=2)["x_ood"]
    np.testing.assert_array_equal(noise, same)
    for other in ({"step": 4}, {"step": 3, "seed": 1}):
        assert not np.array_equal(noise, seen_images(images, **other)["x_ood"])


def test_given_seeds_are_taken_as_they_are():
    images = np.full((2, 3, 3, 1), 0.25, np.float32)
    seen = seen_images({"x_gen": images, "x_ood": images + 0.5})
    np.testing.assert_array_equal(seen["x_ood"], images + 0.5)
