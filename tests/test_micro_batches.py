"""A batch in parts makes the update of the whole batch, without moving images."""

from dataclasses import replace
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_compiled
import tiny

from atebm_jax import UserError, config, hlo, models, stages, train, train_step
from atebm_jax.models import layers

SHAPE, BATCH_SIZE = test_compiled.SHAPE, test_compiled.BATCH_SIZE


class WithoutStatistics(nn.Module):
    """Two convolutions with layer normalisation, as ConvNeXt has it."""

    num_classes: int = 4

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.gelu(nn.LayerNorm()(layers.Conv(8, 3, 2, 1, name="conv0")(x)))
        x = layers.Conv(8, 3, 1, 1, name="conv1")(x)
        return nn.Dense(self.num_classes, name="fc")(x.mean(axis=(1, 2)))


NETWORKS = {"stage1": WithoutStatistics(), "stage2": reference.TwoLayers()}
OTHERS = {"weight_r1": 0.3, "weight_ce": 2.0}
OTHERS |= {"adversary.keep_best": True, "adversary.momentum": 0.9}


@cache
def update(stage, parts, others, devices):
    """The compiled update, its state at T = 2, and the mesh that both are for."""
    step, state = test_compiled.update_of(
        NETWORKS[stage], stage, parts=parts, **(OTHERS if others else {})
    )
    if stage == "stage2":
        state = replace(state, extra=replace(state.extra, num_steps=jnp.int32(2)))
    mesh = test_compiled.mesh_of(devices)
    return test_compiled.jitted(step, mesh), state, mesh


def trained(stage, parts, others=False, devices=1, batch_of=lambda batch: batch):
    """State and metrics after two updates."""
    step, state, mesh = update(stage, parts, others, devices)
    state, _ = test_compiled.placed(state, mesh)
    history = []
    for seed in range(2):
        _, batch = test_compiled.placed((), mesh, seed)
        state, metrics = step(state, batch_of(batch))
        history.append(metrics)
    return jax.device_get((state, history))


@pytest.mark.parametrize(
    ("stage", "others"), [("stage1", False), ("stage2", False), ("stage2", True)]
)
def test_parts_make_the_update_of_the_whole(stage, others):
    """Only the order of sums differs: measured 5e-7."""
    whole = trained(stage, 1, others)
    parts = trained(stage, 4, others)
    reference.assert_close(parts, whole, atol=2e-6)
    start = test_compiled.update_of(NETWORKS[stage], stage)[1]
    assert reference.max_difference(whole[0].params, start.params) > 1e-3


def test_parts_over_devices_make_the_same_update():
    whole = trained("stage2", 1)
    reference.assert_close(trained("stage2", 2, devices=8), whole, atol=2e-6)


def test_parts_of_bytes_and_of_noise_are_those_of_the_whole():
    def without_seeds(batch):
        bytes_ = {k: (255 * x).astype(jnp.uint8) for k, x in batch.items() if "x_" in k}
        bytes_.pop("x_ood")
        return {k: x for k, x in batch.items() if "y_" in k} | bytes_

    whole, parts = (trained("stage2", k, batch_of=without_seeds) for k in (1, 4))
    reference.assert_close(parts, whole, atol=2e-6)


def test_one_broken_image_breaks_the_step_whichever_part_it_is_in():
    def broken(batch):
        return {**batch, "x_cls": batch["x_cls"].at[5, 0, 0, 0].set(jnp.nan)}

    state, history = trained("stage2", 4, batch_of=broken)
    assert int(state.skipped) == 2 and not np.isfinite(history[0]["gradient_norm"])
    fresh = test_compiled.update_of(NETWORKS["stage2"])[1]
    reference.assert_same_bits(state.params, jax.device_get(fresh.params))


@pytest.fixture(scope="module")
def program():
    step, state, mesh = update("stage2", 2, False, 8)
    lowered = step.lower(*test_compiled.placed(state, mesh))
    return reference.Program(reference.compiled(lowered).as_text())


def test_no_image_leaves_its_device(program):
    found = hlo.collectives(program.everything())
    assert {c.kind for c in found} <= {"all-reduce", "all-gather"}
    gathered = [c.elements for c in found if c.kind == "all-gather"]
    assert max(gathered) <= BATCH_SIZE  # scores for the AUC
    largest_kernel = 3 * 3 * 8 * 8
    reduced = [c.elements for c in found if c.kind == "all-reduce"]
    assert max(reduced) <= largest_kernel


def test_inner_loops_of_parts_do_not_communicate(program):
    bodies = [
        body
        for body in test_compiled.pgd_bodies(program)
        if not any(" while(" in line for line in body)
    ]
    assert len(bodies) == 2
    for body in bodies:
        assert hlo.collectives(body) == []


def test_batch_that_does_not_split_is_refused():
    settings = tiny.config(**{"stage2.num_micro_batches": 3})
    with pytest.raises(UserError, match="stage2.num_micro_batches is 3.*divide"):
        config.check(settings)
    with pytest.raises(ValueError, match="num_micro_batches is 0"):
        test_compiled.update_of(reference.TwoLayers(), parts=0)
    step, state = test_compiled.update_of(reference.TwoLayers(), parts=3)
    with pytest.raises(ValueError, match="16 does not split into 3"):
        jax.eval_shape(step, *test_compiled.placed(state, test_compiled.mesh_of(1)))


def test_batch_of_a_job_splits_over_devices_and_parts(tmp_path):
    """Eight devices here, so 16 images make two parts and no more."""
    with pytest.raises(UserError, match="8 devices times num_micro_batches=4.*32"):
        tiny.run(tiny.config(**{"stage2.num_micro_batches": 4}), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}


def test_stage1_refuses_parts_where_statistics_are_of_the_batch():
    settings = tiny.config(**{"stage1.num_micro_batches": 2})
    model = models.build(settings.model)
    with pytest.raises(UserError, match="stage1.num_micro_batches is 2.*BatchNorm"):
        train.plan_stage(settings, "stage1", model, 6)
    settings.stage2.num_micro_batches = 2
    train.plan_stage(settings, "stage2", model, 6)


def test_parts_of_hand_worked_numbers():
    """loss = mean (w - t)^2 / 2 over t = 1, 2, 3, 6 at w = 1: 15/4 and gradient -2."""

    def loss(params, batch_stats, batch, made):
        difference = params["w"] - batch["t"]
        outputs = {"mean": batch["t"].mean(), "each": batch["t"] + made["zero"]}
        return 0.5 * jnp.square(difference).mean(), (batch_stats, outputs)

    stage = stages.Stage(
        (), lambda key, variables, extra, batch: {"zero": 0 * batch["t"]}, loss
    )
    differentiate = train_step._in_parts(stage, 2)
    batch = {"t": jnp.float32([1, 2, 3, 6])}
    total, gradients, _, outputs = differentiate(
        None, {"w": jnp.float32(1)}, {}, batch, ()
    )
    assert total == 3.75 and gradients["w"] == -2 and outputs["mean"] == 3
    np.testing.assert_array_equal(outputs["each"], batch["t"])
