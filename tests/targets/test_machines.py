"""Machines as their compilers describe them: meshes of their devices, their memory."""

import re

import jax
import jax.numpy as jnp
import pytest
import reference
import tiny

from atebm_jax import hlo, sharding, target_programs, targets

# One of each kind of TPU.
TPUS = ("v2:2x2", "v3:2x2", "v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:4x4")
TPUS += ("tpu7x:2x2x1",)
# More elements than any device holds.
TOO_MANY = 2**36


def devices(name, num_slices=1, monkeypatch=None):
    target = reference.target(name)
    if num_slices > 1:
        describe = targets.topologies.get_topology_desc
        monkeypatch.setattr(
            targets.topologies,
            "get_topology_desc",
            lambda **options: describe(num_slices=num_slices, **options),
        )
    return targets.devices(target)


@pytest.mark.parametrize("name", TPUS)
def test_memory_of_a_tpu_is_what_its_compiler_refuses_to_go_beyond(name):
    place = jax.sharding.SingleDeviceSharding(devices(name)[0])
    array = jax.ShapeDtypeStruct((TOO_MANY,), jnp.float32, sharding=place)
    with pytest.raises(jax.errors.JaxRuntimeError) as refusal:
        jax.jit(lambda x: jnp.cumsum(x) + x[::-1]).lower(array).compile()
    [available] = re.findall(r"available HBM \((.*)G\)", str(refusal.value))
    # Another version of the compiler may keep some more for itself.
    expected = pytest.approx(targets.parse(name).chip.memory_gib, rel=0.01)
    assert float(available) == expected


@pytest.mark.parametrize("spec", ["data:-1", "data:-1,fsdp:2", "fsdp:-1"])
@pytest.mark.parametrize("name", (*TPUS, "h100:16"))
def test_devices_of_every_kind_make_a_mesh(name, spec):
    """fsdp:2 on 4x4 chips takes half of a side."""
    found = devices(name)
    mesh = sharding.make_mesh(spec, found)
    assert set(mesh.devices.flat) == set(found)
    assert dict(mesh.shape) == sharding.parse_mesh(spec, len(found))


@pytest.mark.parametrize("name", ["v5e:4x4", "v6e:4x4", "v4:2x2x4", "h100:16"])
def test_rows_are_in_the_order_of_the_processes(name):
    """A ring through all chips, which `make_mesh` takes, is not."""
    found = devices(name)
    placed = sharding.ordered_mesh(found).devices
    assert set(placed) == set(found)
    processes = [device.process_index for device in placed]
    assert processes == sorted(processes) and len(set(processes)) > 1


@pytest.mark.parametrize("name", ["v5e:2x2", "v6e:4x4", "v5p:2x2x1"])
@pytest.mark.parametrize(
    ("spec", "slices_of_a_state"),
    [("data:-1,fsdp:4", 1), ("data:3,fsdp:-1", 1), ("fsdp:-1", 3)],
)
def test_a_state_stays_in_one_slice_where_it_can(
    name, spec, slices_of_a_state, monkeypatch
):
    found = devices(name, 3, monkeypatch)
    placed = sharding.make_mesh(spec, found).devices
    assert set(placed.flat) == set(found)
    for state in placed:
        assert len({device.slice_index for device in state}) == slices_of_a_state


@pytest.mark.parametrize("spec", ["data:-1", "data:-1,fsdp:4"])
def test_slices_talk_outside_of_loops_alone(spec, monkeypatch):
    assert len(devices("v5e:2x2", 2, monkeypatch)) == 8
    config = tiny.config(**{"mesh": spec, "stage2.batch_size": 16})
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        lowered, *_ = target_programs.lower_step(
            config, "stage2", targets.parse("v5e:2x2")
        )
    program = reference.Program(reference.compiled(lowered).as_text())
    assert any(" send(" in line for line in program.outside_loops())
    inside = [line for body in program.loop_bodies() for line in body]
    assert inside and not hlo.collectives(inside)
    assert not any(re.search(r" (send|recv)\(", line) for line in inside)
