"""Placement of state and batches on the mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from atebm_jax import UserError, sharding

MESH = sharding.make_mesh()


def test_mesh_has_all_devices_on_one_axis():
    assert MESH.shape == {sharding.BATCH_AXIS: jax.device_count()}
    assert jax.device_count() == 8


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
    sharding.check_batch_size(size, MESH, "batch_size")


@pytest.mark.parametrize(("size", "near"), [(12, 16), (7, 8), (1, 8), (0, 8), (-8, 8)])
def test_batch_size_that_does_not_split_names_a_near_one(size, near):
    with pytest.raises(UserError, match=rf"field is {size},.*8 devices.*{near} say"):
        sharding.check_batch_size(size, MESH, "field")


@pytest.mark.parametrize(
    "arguments", [("host:1", None, None), (None, 2, None), ("host:1", 2, None)]
)
def test_half_a_set_of_process_flags_is_refused(arguments):
    with pytest.raises(UserError, match="go together"):
        sharding.initialize_processes(*arguments)


def test_single_process_needs_no_initialisation(monkeypatch):
    for name in ("TPU_WORKER_HOSTNAMES", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    sharding.initialize_processes(None, None, None)
    assert jax.process_count() == 1
