"""The device mesh and where state and batches live on it.

Data parallel over every device of every process: parameters are replicated, batches
are split along their first axis. The PGD loops then need no communication at all; the
one all-reduce of a step is that of the parameter gradients.

With a second axis, "fsdp", the state between two steps (parameters, averages,
optimiser) is split over it too, the batch still over all devices. A step gathers the
parameters once, before its loops: they need them T times, and gathering them layer by
layer inside would send T times as much.
"""

import contextlib
import io
import math
import operator
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from atebm_jax.errors import UserError
from atebm_jax.names import writable

BATCH_AXIS = "data"
STATE_AXIS = "fsdp"
# Axes of the mesh in their order: neighbouring devices share a state.
AXES = (BATCH_AXIS, STATE_AXIS)
DATA_PARALLEL = "data:-1"

# Arrays with fewer elements stay whole: what they would save is less than what the
# latency of gathering them costs.
SMALLEST_SHARDED = 4096


def initialize_processes(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins the processes of one job; must run before the first use of a device.

    With a coordinator, HOST:PORT of process 0, the three arguments say how; without
    one, JAX finds out by itself on Cloud TPU pods (TPU VMs and GKE, one slice or
    several) and under Slurm, and one process needs nothing.

    Raises:
      UserError: only some of the three are given, or `process_id` is none of
        `num_processes`.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise UserError(
            "--coordinator, --num_processes and --process_id go together: give all "
            "three or none."
        )
    if num_processes is not None and not 0 <= (process_id or 0) < num_processes:
        raise UserError(
            f"--process_id is {process_id}: it must lie in 0..{num_processes - 1}, "
            f"for --num_processes={num_processes}."
        )
    if all(given):
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif _is_one_of_many(os.environ):
        jax.distributed.initialize()
    elif _on_tpu_vm(os.environ):
        # Its other hosts are known to the metadata server alone; none in a notebook.
        with contextlib.suppress(ValueError, OSError):
            jax.distributed.initialize()


def _is_one_of_many(environment: Mapping[str, str]) -> bool:
    """Whether the environment names other processes, which JAX then finds by itself.

    GKE names the hosts of a slice, and the number of slices where there are several.
    Of Slurm's variables only a step's counts: a batch script, too, has SLURM_NTASKS.
    """
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or 1)
    return len(_tpu_hosts(environment).split(",")) > 1 or slices > 1 or tasks > 1


def _on_tpu_vm(environment: Mapping[str, str]) -> bool:
    """Whether this is a TPU VM whose environment names no hosts.

    JAX leaves the first of these variables on a machine with TPU chips, and the second
    on one without.
    """
    return (
        "TPU_ML_PLATFORM" in environment
        and "TPU_SKIP_MDS_QUERY" not in environment
        and environment.get("JAX_PLATFORMS") != "cpu"
        and not _tpu_hosts(environment)
    )


def _tpu_hosts(environment: Mapping[str, str]) -> str:
    names = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    return next((environment[name] for name in names if name in environment), "")


# Longer texts are cut: all processes exchange arrays of this size.
_LONGEST_TEXT = 1024


def first_said(text: str) -> str:
    """What the first process with something to say said; the same in all processes.

    So all end with one message, or none does. Every process must call it.

    Args:
      text: of this process; "" for nothing.
    """
    if jax.process_count() == 1:
        return text
    said = np.zeros(_LONGEST_TEXT, np.uint8)
    encoded = writable(text).encode()[:_LONGEST_TEXT]
    said[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    everyones = np.asarray(multihost_utils.process_allgather(said))
    texts = (bytes(row).rstrip(b"\0").decode(errors="ignore") for row in everyones)
    return next(filter(None, texts), "")


@contextlib.contextmanager
def refused_by_all() -> Iterator[None]:
    """What one process refuses, all refuse; every process must enter this.

    Raises:
      UserError: in every process, if one is raised inside in any of them.
    """
    refusal = ""
    try:
        yield
    except UserError as error:
        refusal = str(error)
    if refusal := first_said(refusal):
        raise UserError(refusal)


def from_first_process(
    arrays: Mapping[str, np.ndarray] | None,
) -> dict[str, np.ndarray] | None:
    """What the first process has, in every process; called by all together."""
    if jax.process_count() == 1:
        return None if arrays is None else dict(arrays)
    file = io.BytesIO()
    if arrays is not None:
        np.savez(file, allow_pickle=False, **arrays)
    content = np.frombuffer(file.getvalue(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    if not size:
        return None
    if jax.process_index() != 0:
        content = np.zeros(size, np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(content))
    with np.load(io.BytesIO(told.tobytes())) as stored:
        return {key: stored[key] for key in stored.files}


def parse_mesh(spec: str, num_devices: int) -> dict[str, int]:
    """Reads the sizes of the mesh's axes.

    Args:
      spec: "AXIS:SIZE" joined by commas, as "data:-1,fsdp:4"; -1, once at most, takes
        the devices that are left. An axis that is not named has size 1.
      num_devices: of all processes.

    Returns:
      Axis -> size, in the order of `AXES`, "data" always among them.

    Raises:
      UserError: the spec cannot be read, or does not use exactly the devices.
    """
    sizes: dict[str, int] = {}
    for part in spec.split(","):
        axis, colon, size = (text.strip() for text in part.partition(":"))
        if axis not in AXES or not colon:
            raise UserError(
                f"config.mesh is {spec!r}: {part.strip()!r} is no AXIS:SIZE with an "
                f"axis of {', '.join(AXES)}; write 'data:-1' or 'data:-1,fsdp:4'."
            )
        if axis in sizes:
            raise UserError(f"config.mesh is {spec!r}: it names {axis} twice.")
        if size != "-1" and (not size.isdecimal() or int(size) == 0):
            raise UserError(
                f"config.mesh is {spec!r}: the size of {axis} is {size!r}; give a "
                "positive number, or -1 for the devices that are left."
            )
        sizes[axis] = int(size)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(
            f"config.mesh is {spec!r}: only one axis can take the devices that are "
            "left (-1); give the other a size."
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if num_devices % fixed or (not free and fixed != num_devices):
        needed = f"a multiple of {fixed}" if free else f"exactly {fixed}"
        raise UserError(
            f"config.mesh is {spec!r}: it needs {needed} devices and there "
            f"{'is 1' if num_devices == 1 else f'are {num_devices}'}; choose sizes "
            "whose product is that number."
        )
    sizes |= {axis: num_devices // fixed for axis in free}
    sizes.setdefault(BATCH_AXIS, 1)
    return {axis: sizes[axis] for axis in AXES if axis in sizes}


def make_mesh(
    spec: str = DATA_PARALLEL, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of all devices that `parse_mesh` describes, with its errors.

    Over several slices (of TPUs, or GPUs that are joined directly; what joins slices is
    slower), the batch axis takes them as far as it divides, so that a split state stays
    in one. Slices of unequal sizes are taken as one.
    """
    devices = jax.devices() if devices is None else devices
    sizes = parse_mesh(spec, len(devices))
    shape = tuple(sizes.values())
    slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    count = len(slices) if len(set(slices.values())) == 1 else 1
    # Axes may also share a side of the network: 4x4 chips are 8 x 2, too.
    if count > 1:
        batch = math.gcd(sizes[BATCH_AXIS], count)
        across = (batch, count // batch)[: len(shape)]
        within = tuple(map(operator.floordiv, shape, across))
        placed = mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    else:
        placed = mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def ordered_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices on one axis, process by process.

    The p-th part of a batch is then that of process p, whatever the machine: rows that
    come back are in the order of the images.
    """
    devices = jax.devices() if devices is None else devices
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(ordered), (BATCH_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices, those of every mesh axis."""
    names = mesh.axis_names
    return NamedSharding(mesh, PartitionSpec(names[0] if len(names) == 1 else names))


def split_axis(shape: tuple[int, ...], count: int) -> int | None:
    """The axis along which an array is split over `count` devices.

    The largest that divides evenly, the last of equal ones; None for arrays that stay
    whole, which are those below `SMALLEST_SHARDED` elements and those without such an
    axis.
    """
    if count == 1 or math.prod(shape) < SMALLEST_SHARDED:
        return None
    fitting = [(size, axis) for axis, size in enumerate(shape) if size % count == 0]
    return max(fitting)[1] if fitting else None


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """Where each array of a state lives between two steps.

    A rule of shapes alone, so that a parameter, its average and its moments lie alike.
    Without an "fsdp" axis every array is replicated.
    """
    count = mesh.shape.get(STATE_AXIS, 1)

    def place(leaf: Any) -> NamedSharding:
        axis = split_axis(tuple(leaf.shape), count)
        if axis is None:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, STATE_AXIS))

    return jax.tree.map(place, tree)


def placed_shapes(tree: Any, mesh: Mesh) -> Any:
    """The shapes of a state with its shardings: what a checkpoint is restored as."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        state_shardings(tree, mesh),
    )


def shapes_at(tree: Any, place: jax.sharding.Sharding) -> Any:
    """The shapes of arrays or of shapes, all with one sharding, to lower a program."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
    )


def gather(tree: Any, mesh: Mesh) -> Any:
    """Every array whole on every device, inside or outside a compiled function.

    Outside, arrays that are whole already are returned as they are.
    """
    if STATE_AXIS not in mesh.shape:
        return tree
    everywhere = replicated(mesh)

    def constrain(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(x, everywhere), tree
        )

    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        return constrain(tree)
    return jax.jit(constrain, out_shardings=everywhere)(tree)


def scatter(tree: Any, mesh: Mesh) -> Any:
    """Inside a compiled function: every array where its part of the state lives.

    On gradients it makes the sum over devices a reduce-scatter where the platform has
    one.
    """
    if STATE_AXIS not in mesh.shape:
        return tree
    return jax.tree.map(
        jax.lax.with_sharding_constraint, tree, state_shardings(tree, mesh)
    )


def put_state(tree: Any, mesh: Mesh) -> Any:
    """Places a state of host or device arrays; every process must hold the same."""
    return jax.device_put(tree, state_shardings(tree, mesh))


def check_batch_size(
    batch_size: int, num_devices: int, field: str, num_micro_batches: int = 1
) -> None:
    """Refuses a batch that does not split evenly.

    Raises:
      UserError: `batch_size` is not a positive multiple of the device count times
        the number of micro-batches.
    """
    unit = num_devices * num_micro_batches
    if batch_size < 1 or batch_size % unit:
        nearest = max(round(batch_size / unit), 1) * unit
        times = f" times num_micro_batches={num_micro_batches}"
        parts = times if num_micro_batches > 1 else ""
        raise UserError(
            f"{field} is {batch_size}, which does not split evenly over "
            f"{num_devices} devices{parts}: use a positive multiple of {unit}, "
            f"{nearest} say."
        )


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Places a pytree of host or device arrays on every device.

    Every process must hold the same values.
    """
    return jax.device_put(tree, replicated(mesh))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays of this process's part of a batch.

    [B / processes, ...] -> [B, ...], split along the first axis.
    """
    target = batched(mesh)
    return {
        name: jax.make_array_from_process_local_data(target, value)
        for name, value in batch.items()
    }


def prefetch(
    batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh
) -> Iterator[dict[str, jax.Array]]:
    """`put_batch` of each batch, while the one before is worked on.

    So two are on the devices at once.
    """
    waiting = None
    for batch in batches:
        placed = put_batch(batch, mesh)
        if waiting is not None:
            yield waiting
        waiting = placed
    if waiting is not None:
        yield waiting
