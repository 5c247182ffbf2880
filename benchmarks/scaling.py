"""How a step of stage 2 scales: measured in the compiled program, then estimated.

`measure` compiles the step for 1, 2, 4 and 8 virtual CPU devices with the same batch a
device and reads what each device does: FLOPs, bytes, communication. `estimate` takes
FLOPs and parameters of real rows from shapes (`atebm_jax.dry_run`), link speeds from
public specifications, and says what the all-reduce costs on large machines.

    python benchmarks/scaling.py measure [--mesh=data:-1,fsdp:-1] [--per_device=4]
    python benchmarks/scaling.py estimate
"""

import argparse
import math
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]


class Cluster(NamedTuple):
    """Devices and what one of them sends, each from a public specification.

    Attributes:
      devices: how many.
      peak: bfloat16 FLOP/s of one.
      link: bytes a second that one device sends in a ring, the slowest link on it.
    """

    devices: int
    peak: float
    link: float


# v5e: 197 TFLOP/s, 1600 Gbit/s between chips over four links, of which a ring needs
# one: https://cloud.google.com/tpu/docs/v5e
# H100 SXM: 989 TFLOP/s; between machines 400 Gbit/s a GPU (one ConnectX-7 each), as
# submitted to MLPerf (docs/performance.md has the address); NVLink inside is faster.
CLUSTERS = {
    "v5e-256": Cluster(256, 197e12, 1600e9 / 8 / 4),
    "64 H100": Cluster(64, 989e12, 400e9 / 8),
}
ROWS = {
    "WRN-34-10 at 32": "configs/cifar10.py:wrn34_10_t50",
    "ResNet-50 at 256": "configs/imagenet256.py:resnet50_t30",
    "ConvNeXt-L at 256": "configs/imagenet256.py:convnext_large_t110",
}
# Share of the peak that the arithmetic reaches, an assumption (as in dry_run).
UTILISATION = 0.4
# Scaling has stopped where less than this share of a step is arithmetic.
SHARE = 0.9

_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)
_ARRAY = re.compile(r"(\w+?)(\d+)\[([\d,]*)\]")


def communicated(text: str) -> int:
    """Bytes of the results of all communications in a compiled program."""
    total = 0
    for line in text.splitlines():
        found = _COLLECTIVE.search(line)
        for _, bits, sizes in _ARRAY.findall(found[1]) if found else []:
            total += int(bits) // 8 * math.prod(int(n) for n in sizes.split(",") if n)
    return total


def measure(spec: str, per_device: int, counts: tuple[int, ...]) -> Iterator[dict]:
    """Compiles the step for each number of devices; yields a row of the table each."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from atebm_jax import models, sharding, train
    from atebm_jax.command_line import load_config
    from atebm_jax.models import forms

    for count in counts:
        config = load_config(str(ROOT / "configs" / "digits.py"))
        config.stage2.batch_size = per_device * count
        config.stage2.warmup_steps = 0
        model = models.build(config.model)
        sizes = sharding.parse_mesh(spec, count)
        devices = np.array(jax.devices()[:count]).reshape(tuple(sizes.values()))
        mesh = Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
        plan = train.plan_stage(config, "stage2", model, 10, mesh)
        shape = tuple(config.data.image_shape)
        variables = jax.eval_shape(
            partial(model.init, jax.random.key(0)),
            jax.ShapeDtypeStruct((1, *shape), np.float32),
        )
        state = sharding.placed_shapes(jax.eval_shape(plan.new_state, variables), mesh)
        batch = _batch(per_device * count, shape, sharding.batched(mesh))
        placement = jax.tree.map(lambda x: x.sharding, state)
        # The form of GPUs and TPUs: CPU's has loops, whose bodies would count once.
        with forms.only("xla"):
            lowered = train.jit_step(plan.step, placement, mesh).lower(state, batch)
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        yield {
            "devices": count,
            "batch": per_device * count,
            "MFLOP a device": compiled.cost_analysis()["flops"] / 1e6,
            "state and batch, KiB a device": memory.argument_size_in_bytes / 1024,
            "workspace, KiB a device": memory.temp_size_in_bytes / 1024,
            "communicated, KiB": communicated(compiled.as_text()) / 1024,
        }


def _batch(size: int, shape: tuple[int, ...], placed: Any) -> dict[str, Any]:
    import jax
    import numpy as np

    images = jax.ShapeDtypeStruct((size, *shape), np.float32, sharding=placed)
    labels = jax.ShapeDtypeStruct((size,), np.int32, sharding=placed)
    return {"x_gen": images, "x_cls": images, "x_ood": images} | {
        "y_gen": labels,
        "y_cls": labels,
    }


def all_reduce_seconds(parameters: int, cluster: Cluster) -> float:
    """A ring sends 2 (n - 1) / n of the float32 gradient from every device."""
    sent = 2 * (cluster.devices - 1) / cluster.devices * 4 * parameters
    return sent / cluster.link


def smallest_batch(image_flops: float, parameters: int, cluster: Cluster) -> int:
    """Images a device at which `SHARE` of a step is arithmetic, nothing overlapped."""
    wanted = SHARE / (1 - SHARE) * all_reduce_seconds(parameters, cluster)
    return math.ceil(wanted * cluster.peak * UTILISATION / image_flops)


def estimate(rows: dict[str, str]) -> Iterator[dict]:
    """What the all-reduce of real rows costs on every cluster."""
    from atebm_jax import dry_run
    from atebm_jax.command_line import load_config

    for name, path in rows.items():
        cost = dry_run.measure(load_config(str(ROOT / path)), "stage2")
        last = cost.turns["contrastive step"]
        for machine, cluster in CLUSTERS.items():
            seconds = all_reduce_seconds(cost.parameters, cluster)
            yield {
                "network": name,
                "machine": machine,
                "gradient, MB": 4 * cost.parameters / 1e6,
                "sent a device, MB": seconds * cluster.link / 1e6,
                "all-reduce, ms": 1e3 * seconds,
                "images a device, T = 0": smallest_batch(
                    cost.step_flops(1, 0), cost.parameters, cluster
                ),
                f"images a device, T_max = {last}": smallest_batch(
                    cost.step_flops(1), cost.parameters, cluster
                ),
            }


def show(rows: Iterator[dict]) -> None:
    """Prints rows as a Markdown table."""
    for number, row in enumerate(rows):
        # T_max differs from row to row: it goes into the cell.
        cells = {}
        for key, value in row.items():
            head, equals, last = key.partition("T_max = ")
            text = f"{value:,.1f}" if isinstance(value, float) else f"{value}"
            cells[f"{head}T_max" if equals else key] = (
                f"{text} (T_max {last})" if equals else text
            )
        if number == 0:
            print("|", " | ".join(cells), "|")
            print("|" + "---|" * len(cells))
        print("|", " | ".join(cells.values()), "|", flush=True)


def main() -> None:
    """Prints one of the two tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("measure", "estimate"))
    parser.add_argument("--mesh", default="data:-1", help="as config.mesh")
    parser.add_argument("--per_device", type=int, default=4, help="images a device")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import jax

    jax.config.update("jax_platforms", "cpu")
    if arguments.what == "estimate":
        return show(estimate(ROWS))
    jax.config.update("jax_num_cpu_devices", 8)
    return show(measure(arguments.mesh, arguments.per_device, (1, 2, 4, 8)))


if __name__ == "__main__":
    main()
