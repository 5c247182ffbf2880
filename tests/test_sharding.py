"""Placement of state and batches on the mesh."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from atebm_jax import UserError, sharding

MESH = sharding.make_mesh()


def test_mesh_has_all_devices_on_one_axis():
    assert MESH.shape == {sharding.BATCH_AXIS: jax.device_count()}
    assert jax.device_count() == 8


@pytest.mark.parametrize(
    ("slices", "spec", "numbers"),
    [
        ([4, 4], "data:-1,fsdp:2", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ([4, 4], "fsdp:-1", [range(8)]),
        ([4, 2], "data:-1", range(6)),
    ],
    ids=["two machines", "a state over two machines", "machines of unequal size"],
)
def test_machines_of_gpus_are_slices(slices, spec, numbers, monkeypatch):
    """JAX numbers their slices; no compiler describes some without devices."""
    of_slice = np.repeat(np.arange(len(slices)), slices)
    devices = [
        SimpleNamespace(id=n, slice_index=k, platform="gpu", device_kind="NVIDIA H100")
        for n, k in enumerate(of_slice)
    ]
    monkeypatch.setattr(sharding, "Mesh", lambda placed, *_, **__: placed)
    placed = sharding.make_mesh(spec, devices)
    found = np.vectorize(lambda device: device.id, otypes=[int])(placed)
    np.testing.assert_array_equal(found, np.array(numbers))


def test_ordered_mesh_goes_process_by_process(monkeypatch):
    processes = [0, 1, 1, 0, 2, 2]
    devices = [SimpleNamespace(id=n, process_index=p) for n, p in enumerate(processes)]
    monkeypatch.setattr(sharding, "Mesh", lambda placed, *_, **__: placed)
    assert [d.id for d in sharding.ordered_mesh(devices)] == [0, 3, 1, 2, 4, 5]


def test_batch_is_split_and_keeps_values_and_dtypes():
    batch = {
        "x_cls": np.arange(16 * 12, dtype=np.uint8).reshape(16, 2, 2, 3),
        "y_cls": np.arange(16, dtype=np.int32),
    }
    placed = sharding.put_batch(batch, MESH)
    for name, value in batch.items():
        np.testing.assert_array_equal(placed[name], value)
        assert placed[name].dtype == value.dtype
        assert placed[name].sharding.spec == PartitionSpec("data")
        shards = placed[name].addressable_shards
        assert [s.data.shape[0] for s in shards] == [2] * 8
        np.testing.assert_array_equal(shards[3].data, value[6:8])


def test_state_lies_whole_on_every_device():
    tree = {"w": np.arange(3.0, dtype=np.float32), "n": np.int32(4)}
    placed = sharding.put_replicated(tree, MESH)
    for name, value in tree.items():
        assert placed[name].sharding.is_fully_replicated
        assert len(placed[name].addressable_shards) == 8
        np.testing.assert_array_equal(placed[name].addressable_shards[5].data, value)


@pytest.mark.parametrize("size", [8, 16, 128])
def test_batch_size_that_splits_evenly_is_taken(size):
    sharding.check_batch_size(size, MESH.size, "batch_size")


@pytest.mark.parametrize(("size", "near"), [(12, 16), (7, 8), (1, 8), (0, 8), (-8, 8)])
def test_batch_size_that_does_not_split_names_a_near_one(size, near):
    with pytest.raises(UserError, match=rf"field is {size},.*8 devices.*{near} say"):
        sharding.check_batch_size(size, MESH.size, "field")


@pytest.mark.parametrize(
    "arguments", [("host:1", None, None), (None, 2, None), ("host:1", 2, None)]
)
def test_half_a_set_of_process_flags_is_refused(arguments):
    with pytest.raises(UserError, match="go together"):
        sharding.initialize_processes(*arguments)


def test_single_process_needs_no_initialisation(monkeypatch):
    for name in ("TPU_WORKER_HOSTNAMES", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    sharding.initialize_processes(None, None, None)
    assert jax.process_count() == 1


TPU_VM = {"TPU_ML_PLATFORM": "JAX"}


@pytest.mark.parametrize(
    ("environment", "many"),
    [
        ({}, False),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, True),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        # A batch script that starts no step of its own.
        ({"SLURM_NTASKS": "8"}, False),
    ],
)
def test_several_processes_are_recognised(environment, many):
    assert sharding._is_one_of_many(environment) == many


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        (TPU_VM, True),
        ({}, False),
        (TPU_VM | {"TPU_WORKER_HOSTNAMES": "a,b"}, False),
        (TPU_VM | {"JAX_PLATFORMS": "cpu"}, False),
        (TPU_VM | {"TPU_SKIP_MDS_QUERY": "1"}, False),
    ],
)
def test_hosts_of_a_tpu_vm_are_asked_for(environment, asked):
    assert sharding._on_tpu_vm(environment) == asked


def test_tpu_vm_without_other_hosts_is_one_process(monkeypatch):
    def none_found():
        raise ValueError("coordinator_address should be defined.")

    for name in ("TPU_WORKER_HOSTNAMES", "SLURM_STEP_NUM_TASKS", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setenv("TPU_ML_PLATFORM", "JAX")
    monkeypatch.setattr(jax.distributed, "initialize", none_found)
    sharding.initialize_processes(None, None, None)
