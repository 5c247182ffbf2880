"""What a compiled update of stage 2 does, and what it never does."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType

from atebm_jax import (
    ascent,
    energy,
    hlo,
    models,
    optim,
    sharding,
    stages,
    train,
    train_step,
)
from atebm_jax.models import forms

# Two images a device: no convolution of the loop looks like a kernel's.
SHAPE, BATCH_SIZE = (8, 8, 3), 16
CONVOLUTIONS = 9  # of WRN-10-1, shortcuts included


def mesh_of(count):
    return jax.make_mesh(
        (count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )


def update_of(
    network,
    stage="stage2",
    threshold=0.0,
    parts=1,
    gather=None,
    scatter=None,
    **settings,
):
    """The update and a fresh state on random weights."""
    optimizer = optim.optimizer("sgd", weight_decay=5e-4)
    if stage == "stage2":
        settings |= {"auc_threshold": threshold, "t_max": 50}
        settings |= {"auc_window_images": 256}  # two steps of 128
    built = stages.STAGES[stage].build(
        network, reference.stage_config(stage, **settings)
    )
    step = train_step.make(
        built,
        optimizer,
        optim.schedule("constant", peak=0.01, num_steps=10),
        num_micro_batches=parts,
        **({} if gather is None else {"gather": gather, "scatter": scatter}),
    )
    weights = reference.random_variables(network, SHAPE)
    return step, train_step.create_state(
        weights, optimizer, extra=built.init(jax.random.key(0), SHAPE)
    )


def placed(state, mesh, seed=0, num_classes=4):
    batch = reference.random_batch(BATCH_SIZE, SHAPE, num_classes, seed)
    return sharding.put_replicated(state, mesh), sharding.put_batch(batch, mesh)


def jitted(step, mesh):
    everywhere = sharding.replicated(mesh)
    return jax.jit(step, out_shardings=(everywhere, everywhere))


@pytest.fixture(scope="module")
def program():
    """The update of a WideResNet over all eight devices."""
    mesh = mesh_of(8)
    step, state = update_of(reference.network())
    # The form of accelerators, where each convolution is one operation.
    with forms.only("xla"):
        lowered = jitted(step, mesh).lower(*placed(state, mesh))
    return reference.Program(reference.compiled(lowered).as_text())


def pgd_bodies(program):
    """Loop bodies with convolutions; those of sorting and searching have none."""
    bodies = program.loop_bodies()
    return [body for body in bodies if reference.convolutions(body)]


def test_parameter_gradients_never_appear_in_the_inner_loop(program):
    bodies = pgd_bodies(program)
    assert len(bodies) == 2  # contrastive images and the classifier's adversary
    per_device = BATCH_SIZE // 8
    for body in bodies:
        made = reference.convolutions(body)
        # Forward and image gradient of every layer, no more.
        assert len(made) == 2 * CONVOLUTIONS
        assert all(shape[0] == per_device and shape[1] > 1 for shape in made), made


def test_loop_with_parameter_gradients_would_be_seen():
    """The deliberate mistake: three convolutions a layer instead of two."""
    network = reference.TwoLayers()
    weights = reference.random_variables(network, SHAPE)

    def wrong(params, images, labels, num_steps):
        def score(params, x):
            logits = network.apply({**weights, "params": params}, x)
            return energy.score(logits, labels).sum()

        def ascend(_, carry):
            x, total = carry
            by_params, by_images = jax.grad(score, argnums=(0, 1))(params, x)
            # Used, so that the compiler cannot drop them.
            total += sum(leaf.sum() for leaf in jax.tree.leaves(by_params))
            return x + by_images, total

        return jax.lax.fori_loop(0, num_steps, ascend, (images, jnp.float32(0)))

    batch = reference.random_batch(2, SHAPE, 4)
    with forms.only("xla"):
        lowered = jax.jit(wrong).lower(
            weights["params"], batch["x_ood"], batch["y_gen"], jnp.int32(3)
        )
    program = reference.Program(reference.compiled(lowered).as_text())
    (body,) = pgd_bodies(program)
    assert len(reference.convolutions(body)) == 3 * 2


def test_inner_loops_do_not_communicate(program):
    for body in program.loop_bodies():
        assert hlo.collectives(body) == []


def test_communication_is_of_gradients_and_scores_but_never_of_images(program):
    found = hlo.collectives(program.outside_loops())
    assert {c.kind for c in found} == {"all-reduce", "all-gather"}
    # The AUC ranks the scores of the whole batch, the rest are sums.
    gathered = [c.elements for c in found if c.kind == "all-gather"]
    assert max(gathered) <= BATCH_SIZE
    largest_kernel = 3 * 3 * 64 * 64
    reduced = [c.elements for c in found if c.kind == "all-reduce"]
    assert max(reduced) == largest_kernel
    assert len([n for n in reduced if n >= BATCH_SIZE]) == 1


def test_stage1_communicates_statistics_and_gradients_outside_its_loop():
    """Batch statistics of two layers, forward and backward, and the gradients."""
    mesh = mesh_of(8)
    step, state = update_of(reference.TwoLayers(), "stage1")
    with forms.only("xla"):
        lowered = jitted(step, mesh).lower(*placed(state, mesh))
    program = reference.Program(reference.compiled(lowered).as_text())
    (body,) = pgd_bodies(program)
    assert hlo.collectives(body) == []
    found = hlo.collectives(program.outside_loops())
    assert {c.kind for c in found} == {"all-reduce"}
    # Each kernel's once; the backward statistics between them keep the two apart.
    channels, kernels = 8, [3 * 3 * 3 * 8, 3 * 3 * 8 * 8]
    large = [c.elements for c in found if c.elements > channels]
    assert sorted(large) == kernels


def test_bfloat16_split_state_and_parts_leave_the_loops_quiet(monkeypatch):
    """All three at once: parameters are gathered once, for all parts and all loops."""
    # The kernels of so small a network are split too.
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 200)
    mesh = sharding.make_mesh("data:-1,fsdp:4")
    # Flax itself mixes float32 with bfloat16.
    with jax.numpy_dtype_promotion("standard"), forms.only("xla"):
        step, state = update_of(
            reference.TwoLayers(dtype=jnp.bfloat16),
            parts=2,
            gather=partial(sharding.gather, mesh=mesh),
            scatter=partial(sharding.scatter, mesh=mesh),
        )
        state = sharding.put_state(state, mesh)
        placement = sharding.state_shardings(state, mesh)
        compiled = train.jit_step(step, placement, mesh)
        lowered = compiled.lower(state, placed((), mesh)[1])
    program = reference.Program(reference.compiled(lowered).as_text())
    inner = [b for b in pgd_bodies(program) if not any(" while(" in x for x in b)]
    assert len(inner) == 2
    for body in inner:
        assert hlo.collectives(body) == []
    shapes = {x.size for x in jax.tree.leaves(state.params)}
    large = {n for n in shapes if n >= sharding.SMALLEST_SHARDED}
    everywhere = hlo.collectives(program.everything())
    outside = hlo.collectives(program.outside_loops())
    gathered = [c for c in everywhere if c.kind == "all-gather" and c.elements in large]
    assert gathered and all(c in outside for c in gathered)
    assert program.num_aliases == len(jax.tree.leaves(state))


def test_loop_that_communicates_would_be_seen():
    """The deliberate mistake: batch statistics inside the attack."""
    mesh = mesh_of(8)
    network = reference.TwoLayers()
    state, batch = placed(reference.random_variables(network, SHAPE), mesh)

    def wrong(weights, images, labels):
        def objective(x):
            logits, _ = network.apply(weights, x, train=True, mutable=["batch_stats"])
            return energy.score(logits, labels)

        return ascent.climb(objective, images, step_size=0.1, num_steps=3)

    lowered = jax.jit(wrong).lower(state, batch["x_ood"], batch["y_gen"])
    (body,) = pgd_bodies(reference.Program(reference.compiled(lowered).as_text()))
    assert {c.kind for c in hlo.collectives(body)} == {"all-reduce"}


@pytest.fixture(scope="module")
def small():
    """The update of two layers, compiled for one mesh after another."""
    step, state = update_of(reference.TwoLayers())
    return jax.jit(step), state


def test_growing_steps_does_not_recompile(small):
    """One program for T = 0 to 20, whether T is set or grows by itself."""
    step, state = small
    state, batch = placed(state, mesh_of(1))
    before = step._cache_size()
    travels = []
    for count in range(21):
        curriculum = replace(state.extra, num_steps=jnp.int32(count))
        curriculum = sharding.put_replicated(curriculum, mesh_of(1))
        _, metrics = step(replace(state, extra=curriculum), batch)
        assert int(metrics["T"]) == count
        travels.append(float(metrics["travel"]) * max(count, 1))
    assert step._cache_size() - before == 1
    # The loop did run longer: seeds travel further.
    assert travels[0] == 0 and travels[1] > 0 and travels[20] > 5 * travels[1]


def run_steps(step, state, count, mesh):
    state, _ = placed(state, mesh)
    history = []
    for seed in range(count):
        _, batch = placed((), mesh, seed)
        state, metrics = step(state, batch)
        history.append(metrics)
    return jax.device_get((state, history))


@pytest.fixture(scope="module")
def alone(small):
    """Three updates on a single device, the last two with contrastive steps."""
    step, state = small
    curriculum = replace(state.extra, num_steps=jnp.int32(2))
    return run_steps(step, replace(state, extra=curriculum), 3, mesh_of(1))


@pytest.mark.parametrize("devices", [2, 8])
def test_number_of_devices_does_not_change_the_training(small, alone, devices):
    """Only the order of sums differs: measured 2e-7 on losses, 3e-8 on parameters."""
    step, state = small
    curriculum = replace(state.extra, num_steps=jnp.int32(2))
    state = replace(state, extra=curriculum)
    many = run_steps(step, state, 3, mesh_of(devices))
    reference.assert_close(many, alone, atol=2e-6)
    moved = reference.max_difference(alone[0].params, state.params)
    assert moved > 1e-3
    assert int(many[0].extra.num_steps) == 3


def test_stage1_normalises_over_the_global_batch():
    step, state = update_of(reference.TwoLayers(), "stage1")
    step = jax.jit(step)
    one, eight = (run_steps(step, state, 2, mesh_of(count)) for count in (1, 8))
    reference.assert_close(eight, one, atol=1e-5)
    assert reference.max_difference(one[0].batch_stats, state.batch_stats) > 1e-3


def test_broken_batch_is_skipped_and_changes_nothing_else(small):
    step, state = small
    state, batch = placed(state, mesh_of(1))
    state, _ = step(state, batch)
    for name in ("x_gen", "x_cls", "x_ood"):
        image = batch[name].at[3, 0, 0, 0].set(jnp.nan)
        after, metrics = step(state, {**batch, name: image})
        # Compiled for CPU, the rectifier swallows NaN: the loss alone would not tell.
        assert not np.isfinite(metrics["gradient_norm"])
        assert int(after.skipped) == int(after.skipped_in_row) == 1
        counters = ("step", "skipped", "skipped_in_row")
        same = {counter: getattr(state, counter) for counter in counters}
        reference.assert_same_bits(replace(after, **same), state)
        assert int(after.step) == int(state.step) + 1


def test_step_needs_nothing_from_the_host_but_its_batch(small):
    step, state = small
    state, batch = placed(state, mesh_of(1))
    state, _ = step(state, batch)
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            state, metrics = step(state, batch)
    assert np.isfinite(metrics["loss"])
    # The guard would tell: a program for images of the host takes one transfer.
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="host-to-dev"):
        jax.jit(jnp.negative)(np.asarray(batch["x_gen"]))


def test_state_may_be_donated(small):
    _, state = small
    step, _ = update_of(reference.TwoLayers())
    state, batch = placed(state, mesh_of(1))
    donating = jax.jit(step, donate_argnums=0)
    after, _ = donating(state, batch)
    again, _ = donating(after, batch)
    assert int(again.step) == 2
    assert after.params["fc"]["bias"].is_deleted()


def test_sampling_compiles_once_for_all_numbers_of_steps():
    network = reference.TwoLayers()
    logits_fn = models.logits_fn(network, reference.random_variables(network, SHAPE))
    images = jnp.asarray(reference.random_batch(2, SHAPE, 4)["x_ood"])
    sample = jax.jit(
        lambda count, size: ascent.climb(
            lambda x: energy.score(logits_fn(x)),
            images,
            step_size=size,
            num_steps=count,
        )
    )
    for count in (0, 1, 30):
        sample(jnp.int32(count), jnp.float32(0.1 + count))
    assert sample._cache_size() == 1
