"""Machines that are not here, for which XLA's own compilers can compile all the same.

A TPU's compiler is in libtpu, a GPU's in JAX's plugin for CUDA: wheels, no devices.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from atebm_jax.errors import UserError


class Chip(NamedTuple):
    """What one device of a kind has."""

    flops: float  #: bfloat16 FLOP/s, dense
    #: what programs may use of its memory. On a TPU the compiler says so; of a GPU a
    #: tenth is left for the runtime and for the workspace of convolutions, which nobody
    #: knows before they are tried on a device.
    memory_gib: float
    #: of a TPU's matrix units; with it the compiler's cycles become seconds. 0 for a
    #: GPU, whose compiler estimates no time.
    flops_per_cycle: int = 0
    bandwidth: float = 0.0  #: bytes/s of a GPU's memory


#: By the first part of a target's name. FLOP/s and bytes/s: the makers' data sheets;
#: of v2, v3 and tpu7x, where a device is one of a chip's two cores, the half.
CHIPS = {
    "v2": Chip(23e12, 7.48, 32_768),
    "v3": Chip(61.5e12, 15.48, 65_536),
    "v4": Chip(275e12, 30.75, 262_144),
    "v5e": Chip(197e12, 15.75, 131_072),
    "v5p": Chip(459e12, 95.74, 262_144),
    "v6e": Chip(918e12, 31.25, 524_288),
    "tpu7x": Chip(1153.5e12, 94.75, 524_288),
    "a100": Chip(312e12, 71.3, bandwidth=2.04e12),
    "h100": Chip(989e12, 71.3, bandwidth=3.35e12),
    "h200": Chip(989e12, 125.8, bandwidth=4.8e12),
}

# What the compiler asks of a GPU; sizes in bytes.
_H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "major": 9,
    "minor": 0,
    "cores": 132,
    "units": 128,
    "shared": 233_472,
    "optin": 232_448,
    "cache": 50 * 2**20,
    "clock": 1.98,
    "memory": 85_045_542_912,
}
_A100 = {
    "name": "NVIDIA A100-SXM4-80GB",
    "major": 8,
    "minor": 0,
    "cores": 108,
    "units": 64,
    "shared": 167_936,
    "optin": 166_912,
    "cache": 40 * 2**20,
    "clock": 1.41,
    "memory": 85_094_825_984,
}
_H200 = _H100 | {"name": "NVIDIA H200", "memory": 150_109_880_320}
_GPUS = {"a100": _A100, "h100": _H100, "h200": _H200}
_GPU_TEXT = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""
_A_HOST = 8  # GPUs of one machine
# XLA, and ptxas, which XLA calls; for CUDA 12 and 13.
_GPU_WHEELS = ["jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"]
_GPU_WHEELS += ["jax-cuda13-pjrt", "nvidia-cuda-nvcc"]

_KNOWN = (
    "a TPU and its topology (v5e:2x4, v6e:2x4, v5p:2x2x1; also v2, v3, v4, tpu7x), or "
    "a GPU and how many (h100:8, h200:8, a100:8)"
)


class Target(NamedTuple):
    """A machine to compile for."""

    name: str  #: as "v5e:2x4" or "h100:8"
    kind: str  #: a key of `CHIPS`
    sizes: tuple[int, ...]  #: of the topology; of GPUs their number

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def is_gpu(self) -> bool:
        return self.kind in _GPUS

    @property
    def num_devices(self) -> int:
        return len(devices(self))

    def larger(self) -> "Target":
        """The same with twice the devices."""
        # The last of the smallest sides: 2x4, 4x4, 4x8; 2x2x1, 2x2x2, 2x2x4.
        least = len(self.sizes) - 1 - self.sizes[::-1].index(min(self.sizes))
        sizes = list(self.sizes)
        sizes[least] *= 2
        return parse(f"{self.kind}:{'x'.join(map(str, sizes))}")


def parse(name: str) -> Target:
    """Reads a target's name; a `UserError` of no such chip, or no size."""
    kind, colon, sizes = name.partition(":")
    if kind in _GPUS and not colon:
        sizes = "1"
    wanted = r"\d+" if kind in _GPUS else r"\d+(x\d+)*"
    if kind not in CHIPS or not re.fullmatch(wanted, sizes):
        raise UserError(f"--target is {name!r}: give {_KNOWN}.")
    numbers = tuple(map(int, sizes.split("x")))
    if 0 in numbers:
        raise UserError(f"--target is {name!r}: it has no devices; give {_KNOWN}.")
    return Target(name, kind, numbers)


def devices(target: Target) -> Sequence[Any]:
    """The devices of a machine that is not here: programs compile for them, not run.

    JAX stays on this machine's CPU. On a machine with a TPU or GPU, `only_compile` must
    have run before JAX looked for devices.

    Raises:
      UserError: the compiler is not installed, or does not know the topology.
    """
    return _gpus(target) if target.is_gpu else _tpus(target)


def only_compile() -> None:
    """Keeps JAX from taking the devices of this machine; before it looks for any."""
    jax.config.update("jax_platforms", "cpu")


def missing(target: Target) -> str:
    """What to install for a target's compiler; "" where it is here."""
    wheel, extra = "libtpu", "target-tpu"
    if target.is_gpu:
        wheel, extra = "jax_plugins", "target-gpu"
    found = importlib.util.find_spec(wheel) is not None
    if target.is_gpu and found:
        plugins = (f"jax_plugins.xla_cuda{version}" for version in (12, 13))
        found = any(map(importlib.util.find_spec, plugins))
    return "" if found else f"pip install 'atebm_jax[{extra}]'"


def versions(target: Target) -> dict[str, str]:
    """Of jax and of the wheels that hold a target's compiler, those that are here."""
    names = ["jax", *(_GPU_WHEELS if target.is_gpu else ["libtpu"])]
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _tpus(target: Target) -> Sequence[Any]:
    # Read when libtpu is loaded, which looks for no TPU then and takes no lock.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-8"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    # Hosts have 2x2 chips, where there are as many.
    rows, columns = (min(size, 2) for size in (*target.sizes, 1)[:2])
    # JAX takes the two cores of a v4 as one device, and would make no mesh of cores.
    as_one = {"chip_config_name": "megacore"} if target.kind == "v4" else {}
    return _described(
        target,
        platform="tpu",
        topology_name=target.name,
        chips_per_host_bounds=[rows, columns, 1],
        **as_one,
    )


def _gpus(target: Target) -> Sequence[Any]:
    (count,) = target.sizes
    hosts = count // _A_HOST if count % _A_HOST == 0 else 1
    text = _GPU_TEXT.format(**_GPUS[target.kind], bandwidth=target.chip.bandwidth)
    return _described(
        target,
        platform="cuda",
        topology_name=target.kind,
        target_config=text,
        topology=f"1x{hosts}x{count // hosts}",
    )


def _described(target: Target, **options: Any) -> Sequence[Any]:
    if install := missing(target):
        raise UserError(
            f"--target={target.name} needs the compiler of that machine, which is not "
            f"installed: {install}."
        )
    try:
        return topologies.get_topology_desc(**options).devices
    except Exception as error:  # of several kinds, by version and platform
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--target={target.name} is refused by its compiler ({reason}): give "
            f"{_KNOWN}."
        ) from error
