"""The device mesh and where state and batches live on it.

Data parallel over every device of every process: parameters are replicated, batches
are split along their first axis. The PGD loops then need no communication at all; the
one all-reduce of a step is that of the parameter gradients.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from atebm_jax.errors import UserError

BATCH_AXIS = "data"


def initialize_processes(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins the processes of one job; must run before the first use of a device.

    With a coordinator the three arguments say how; without one, JAX finds out by
    itself on Cloud TPU pods and under Slurm, and one process needs nothing.

    Args:
      coordinator: HOST:PORT of process 0, or None.
      num_processes: how many processes there are, or None.
      process_id: number of this one, or None.

    Raises:
      UserError: only some of the three are given.
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
    several_hosts = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
    several_tasks = int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if all(given):
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif several_hosts or several_tasks:
        jax.distributed.initialize()


def make_mesh() -> Mesh:
    """A one-dimensional mesh over all devices of all processes."""
    return jax.make_mesh(
        (jax.device_count(),), (BATCH_AXIS,), axis_types=(AxisType.Auto,)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXIS))


def check_batch_size(
    batch_size: int, mesh: Mesh, field: str, num_micro_batches: int = 1
) -> None:
    """Refuses a batch that does not split evenly.

    Raises:
      UserError: `batch_size` is not a positive multiple of the device count times
        the number of micro-batches.
    """
    unit = mesh.size * num_micro_batches
    if batch_size < 1 or batch_size % unit:
        nearest = max(round(batch_size / unit), 1) * unit
        parts = f" in {num_micro_batches} micro-batches" * (num_micro_batches > 1)
        raise UserError(
            f"{field} is {batch_size}, which does not split evenly over "
            f"{mesh.size} devices{parts}: use a positive multiple of {unit}, {nearest} "
            "say."
        )


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Places a pytree of host or device arrays on every device.

    Every process must hold the same values.
    """
    return jax.device_put(tree, replicated(mesh))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays of this process's part of a batch.

    Args:
      batch: arrays [B / processes, ...].
      mesh: the device mesh.

    Returns:
      Global arrays [B, ...], split along the first axis.
    """
    target = batched(mesh)
    return {
        name: jax.make_array_from_process_local_data(target, value)
        for name, value in batch.items()
    }
