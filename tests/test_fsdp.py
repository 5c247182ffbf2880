"""State split over the "fsdp" axis: the same training, less memory, quiet loops."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

from atebm_jax import (
    UserError,
    checkpoint,
    dry_run,
    hlo,
    optim,
    sharding,
    stages,
    train,
    train_step,
)

SHAPE, BATCH_SIZE = (8, 8, 3), 16
# The second kernel and the matrix are large enough to be split, the rest stays whole.
SIZES = {"channels": 64, "num_classes": 96}
MESHES = ("data:-1", "data:-1,fsdp:4", "fsdp:-1")


def update_on(mesh, optimizer="adamw", rate=1e-3, activation="relu"):
    """The jitted update of two layers on a mesh, with its fresh state, placed."""
    network = reference.TwoLayers(activation=activation, **SIZES)
    optimizer = optim.optimizer(optimizer, weight_decay=0.05)
    settings = {"auc_threshold": 0.0, "t_max": 50, "auc_window_images": 256}
    stage = stages.STAGES["stage2"].build(
        network, reference.stage_config("stage2", **settings)
    )
    step = train_step.make(
        stage,
        optimizer,
        optim.schedule("constant", peak=rate, num_steps=10),
        gather=partial(sharding.gather, mesh=mesh),
        scatter=partial(sharding.scatter, mesh=mesh),
    )
    state = train_step.create_state(
        reference.random_variables(network, SHAPE),
        optimizer,
        extra=stage.init(jax.random.key(0), SHAPE),
    )
    state = replace(state, extra=replace(state.extra, num_steps=jnp.int32(2)))
    placed = sharding.put_state(state, mesh)
    placement = sharding.state_shardings(placed, mesh)
    return train.jit_step(step, placement, mesh), placed


def batch_on(mesh, seed=0):
    """This process's part of a batch, its rows in the order of the processes."""
    batch = reference.random_batch(BATCH_SIZE, SHAPE, 4, seed)
    rows = BATCH_SIZE // jax.process_count()
    first = rows * jax.process_index()
    part = {name: value[first : first + rows] for name, value in batch.items()}
    return sharding.put_batch(part, mesh)


def device_bytes(tree):
    """Bytes of a tree on the first device."""
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


@pytest.fixture(scope="module")
def runs():
    """For each mesh: program, bytes of the fresh state, state and metrics after two."""
    results = {}
    for spec in MESHES:
        mesh = sharding.make_mesh(spec)
        step, state = update_on(mesh)
        compiled = reference.compiled(step.lower(state, batch_on(mesh)))
        before = device_bytes(state)
        history = []
        for seed in range(2):
            state, metrics = compiled(state, batch_on(mesh, seed))
            history.append(metrics)
        program = reference.Program(compiled.as_text())
        results[spec] = program, before, state, history
    return results


@pytest.mark.parametrize("spec", MESHES[1:])
def test_split_state_trains_like_a_whole_one(runs, spec):
    """Only the order of sums differs: measured 3e-7 on metrics, 6e-8 on weights."""
    _, _, state, history = runs[spec]
    _, _, whole, expected = runs["data:-1"]
    for name in ("loss", "loss_ce", "loss_bce", "auc", "gradient_norm"):
        for step, metrics in enumerate(history):
            np.testing.assert_allclose(
                metrics[name], expected[step][name], rtol=0, atol=2e-6
            )
    for tree in ("params", "average_params"):
        difference = reference.max_difference(
            jax.device_get(getattr(state, tree)), jax.device_get(getattr(whole, tree))
        )
        assert difference < 1e-6, (tree, difference)
    assert int(state.extra.num_steps) == int(whole.extra.num_steps) == 3


@pytest.mark.parametrize(("spec", "count"), [("data:-1,fsdp:4", 4), ("fsdp:-1", 8)])
def test_split_state_takes_its_part_of_the_memory(runs, spec, count):
    _, before, state, _ = runs[spec]
    _, whole, _, _ = runs["data:-1"]
    leaves = jax.tree.leaves(state)
    large = sum(x.nbytes for x in leaves if x.size >= sharding.SMALLEST_SHARDED)
    assert large > 0.8 * whole
    assert before == whole - large + large // count
    assert device_bytes(state) == before


@pytest.mark.parametrize("spec", MESHES)
def test_inner_loops_do_not_communicate(runs, spec):
    program = runs[spec][0]
    bodies = program.loop_bodies()
    assert sum(bool(reference.convolutions(body)) for body in bodies) == 2
    for body in bodies:
        assert hlo.collectives(body) == []


@pytest.mark.parametrize("spec", MESHES[1:])
def test_parameters_are_gathered_once_and_gradients_reduced_once(runs, spec):
    program, _, state, _ = runs[spec]
    found = hlo.collectives(program.outside_loops())
    sizes = {x.size for x in jax.tree.leaves(state.params)}
    large = {size for size in sizes if size >= sharding.SMALLEST_SHARDED}
    gathered = {c.elements for c in found if c.kind == "all-gather"}
    # Scores for the AUC and parameters: never images, averages or moments.
    assert {n for n in gathered if n > BATCH_SIZE} == large
    reduced = {c.elements for c in found if c.kind in ("all-reduce", "reduce-scatter")}
    assert max(reduced) == max(large)
    assert {c.kind for c in found} <= {"all-gather", "all-reduce", "reduce-scatter"}


@pytest.mark.parametrize("spec", MESHES)
def test_every_buffer_of_the_state_is_taken_over(runs, spec):
    program, _, state, _ = runs[spec]
    assert program.num_aliases == len(jax.tree.leaves(state))


def test_one_reduction_of_all_gradients_is_all_that_data_parallel_sends(runs):
    found = hlo.collectives(runs["data:-1"][0].outside_loops())
    # Scores of the batch and means of the logits are no larger.
    small = max(BATCH_SIZE, SIZES["num_classes"])
    assert len([c for c in found if c.elements > small]) == 1


@pytest.fixture
def saved(runs, tmp_path):
    """A checkpoint of a state that was split over four devices."""
    state = runs["data:-1,fsdp:4"][2]
    with checkpoint.manager(tmp_path, "stage2") as checkpoints:
        checkpoint.save(
            checkpoints, state, stage="stage2", config=tiny.config(), metrics=None
        )
    return tmp_path, state


def test_checkpoint_is_restored_on_any_mesh(saved):
    workdir, state = saved
    for spec in MESHES:
        mesh = sharding.make_mesh(spec)
        like = sharding.placed_shapes(jax.eval_shape(lambda: state), mesh)
        with checkpoint.manager(workdir, "stage2") as checkpoints:
            restored = checkpoint.restore(checkpoints, 2, like)
        reference.assert_same_bits(jax.device_get(restored), jax.device_get(state))
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
            lambda x: x.sharding, like
        )
    weights, _ = checkpoint.load_weights(workdir)
    reference.assert_same_bits(weights["params"], jax.device_get(state.average_params))


@pytest.mark.jobs
def test_job_goes_on_with_another_mesh_and_ends_alike(tmp_path):
    """Four steps on one mesh, two on another, then evaluation and samples.

    A smooth activation: where a rectifier's input is zero but for rounding, its
    gradient, and with it an adversarial image, has two values, and any other order of
    sums may take the other one.
    """
    few = {"stage1.schedule": "constant", "stage1.eval_every_steps": 4}
    few |= {"evaluate.samples.num_test": 20, "model.activation": "swish"}
    # Its second kernel is large enough to be split.
    few |= {"model.widen_factor": 4}
    settings = tiny.config(stages="stage1", mesh="fsdp:2,data:-1", **few)
    short = tiny.config(stages="stage1", mesh="data:-1,fsdp:4", **few)
    short.stage1.num_steps = 4
    with pytest.MonkeyPatch.context() as patch:
        tiny.only_the_loop(patch)
        tiny.run(short, tmp_path / "split")
    report, _ = tiny.run(settings, tmp_path / "split", allow_config_change=True)
    settings.mesh = "data:-1"
    expected, _ = tiny.run(settings, tmp_path / "alone")
    weights = [
        checkpoint.load_weights(tmp_path / name)[0] for name in ("split", "alone")
    ]
    # Only the order of sums: measured 3e-7 on weights of about 0.1.
    assert reference.max_difference(*weights) < 3e-6
    figures = [r["stages"]["stage1"] for r in (report, expected)]
    assert figures[0].keys() == figures[1].keys()
    assert figures[0]["clean_accuracy"] == figures[1]["clean_accuracy"]


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        ("data:-1", {"data": 8}),
        ("data:-1,fsdp:4", {"data": 2, "fsdp": 4}),
        ("fsdp:2,data:-1", {"data": 4, "fsdp": 2}),
        ("fsdp:-1", {"data": 1, "fsdp": 8}),
        (" data : 8 ", {"data": 8}),
    ],
)
def test_mesh_is_read(spec, sizes):
    assert sharding.parse_mesh(spec, 8) == sizes
    assert dict(sharding.make_mesh(spec).shape) == sizes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "no AXIS:SIZE"),
        ("model:2", "'model:2' is no AXIS:SIZE with an axis of data, fsdp"),
        ("data", "no AXIS:SIZE"),
        ("data:-1,", "'' is no AXIS:SIZE"),
        ("data:2,data:4", "names data twice"),
        ("data:-1,fsdp:-1", "only one axis"),
        ("data:-1,fsdp:0", "size of fsdp is '0'"),
        ("data:-2", "size of data is '-2'"),
        ("data:1.5", "size of data is '1.5'"),
        ("data:-1,fsdp:3", "a multiple of 3 devices and there are 8"),
        ("data:2,fsdp:2", "exactly 4 devices and there are 8"),
        ("data:16", "exactly 16 devices"),
    ],
)
def test_mesh_that_does_not_fit_is_refused(spec, message):
    with pytest.raises(UserError, match=rf"config\.mesh is .*{message}"):
        sharding.parse_mesh(spec, 8)


def test_job_with_a_wrong_mesh_writes_nothing(tmp_path):
    with pytest.raises(UserError, match=r"config\.mesh"):
        tiny.run(tiny.config(mesh="data:-1,fsdp:3"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_largest_axis_that_divides_is_split():
    assert sharding.split_axis((3, 3, 64, 128), 4) == 3
    assert sharding.split_axis((3, 3, 128, 64), 4) == 2
    assert sharding.split_axis((64, 64), 4) == 1
    assert sharding.split_axis((2048, 1001), 4) == 0
    assert sharding.split_axis((4095,), 4) is None  # too small
    assert sharding.split_axis((4097, 3), 4) is None  # nothing divides
    assert sharding.split_axis((64, 64), 1) is None


def test_dry_run_knows_what_a_device_holds_of_a_split_state():
    network = {"model.name": "wide_resnet"}
    settings = tiny.config(stages="stage2", init_from="anything", **network)
    whole = dry_run.measure(settings, "stage2")
    split = dry_run.measure(settings, "stage2", fsdp=4)
    assert split.state_bytes < 0.4 * whole.state_bytes
    assert (whole.gathered_bytes, split.gathered_bytes) == (0, whole.gradient_bytes)
    machine = dry_run.Machine(devices=8)
    settings.mesh = "data:-1,fsdp:4"
    figures = dry_run.run(settings, machine)
    assert figures["stage2"]["state_bytes"] == split.state_bytes
    settings.mesh = "fsdp:3"
    with pytest.raises(UserError, match="config.mesh"):
        dry_run.run(settings, machine)
