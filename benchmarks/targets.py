"""One turn of the PGD loop as the compiler of a TPU or GPU sees it, without one.

    python benchmarks/targets.py --target=v5e:2x4 --rows=resnet50,wrn34_10

Rows are networks in bfloat16, each at one size and number of images a chip. A TPU's
compiler estimates the cycles of every instruction: the time is their sum. A GPU's does
not: its table has the kernels that a turn launches, and the time that their bytes and
FLOPs need at the peaks of the chip. Nothing here is measured on a device.

It needs libtpu (`pip install "jax[tpu]"`) or the plugin for CUDA
(`pip install "jax[cuda13-local]"` and ptxas), and a minute or two a row.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

# Before JAX is imported: no device is looked for, and no lock is taken on a TPU.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
import jax.numpy as jnp
import options
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from atebm_jax import archs, ascent, energy, hlo, models
from atebm_jax.errors import UserError, check_choice
from atebm_jax.models import cpu

#: Pixels a side, and images a chip.
ROWS = {
    "wrn16_4": (32, 128),
    "wrn34_10": (32, 128),
    "resnet50": (256, 16),
    "wide_resnet50_4": (256, 16),
    "convnext_large_cvst": (256, 16),
}
#: bfloat16 FLOP/s of a chip, and FLOPs of its matrix units a cycle.
TPUS = {"v5e": (197e12, 131_072), "v5p": (459e12, 262_144), "v6e": (918e12, 524_288)}
#: bfloat16 FLOP/s and bytes/s of a card.
GPUS = {"h100": (989e12, 3.35e12)}


def parser() -> options.Parser:
    flags = options.Parser(description=__doc__.partition("\n")[0])
    flags.add_argument("--rows", default=",".join(ROWS), help="some of the rows")
    flags.add_argument(
        "--target", default="v5e:2x4", help="a TPU topology as v5e:2x4, or h100"
    )
    return flags


def device(target: str) -> Any:
    """A device of the target, for which programs can be compiled but not run.

    Raises:
      UserError: an unknown target, or its compiler is not installed.
    """
    kind = target.partition(":")[0]
    check_choice("--target", kind, {**TPUS, **GPUS})
    settings: dict[str, Any] = {"platform": "tpu", "topology_name": target}
    if kind in GPUS:
        text = Path(__file__).with_name(f"{kind}.txt").read_text()
        settings = {"platform": "cuda", "topology_name": kind}
        settings |= {"target_config": text, "topology": "1x1x1"}
    else:
        os.environ["TPU_ACCELERATOR_TYPE"] = f"{kind}-8"
    try:
        return topologies.get_topology_desc(**settings).devices[0]
    except (RuntimeError, ValueError, ImportError) as error:
        raise UserError(
            f"--target={target}: its compiler is not here or does not know it; "
            'install "jax[tpu]" for a TPU, "jax[cuda13-local]" for a GPU '
            f"({str(error).splitlines()[0]})"
        ) from None


def compiled_loop(row: str, on: Any) -> hlo.Program:
    """The contrastive loop of a row on one chip."""
    side, batch = ROWS[row]
    model = models.build(archs.model_config(row, dtype="bfloat16"))
    shape, place = (side, side, 3), jax.sharding.SingleDeviceSharding(on)

    def loop(variables: Any, x: jax.Array, y: jax.Array, num_steps: jax.Array) -> Any:
        logits_fn = models.freeze(model, variables, shape)
        return ascent.climb(
            lambda x: energy.score(logits_fn(x), y),
            x,
            step_size=0.2,
            num_steps=num_steps,
        )

    arguments = (
        models.variable_shapes(model, shape),
        jax.ShapeDtypeStruct((batch, *shape), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
    )
    with cpu.forms("xla"):
        lowered = jax.jit(loop).lower(*placed)
    return hlo.Program(lowered.compile().as_text())


def figures(program: hlo.Program, kind: str) -> list[str]:
    """The row's cells: milliseconds a turn, and a GPU's kernels and convolutions."""
    (loop,) = program.loops()
    if kind in TPUS:
        flops_a_second, flops_a_cycle = TPUS[kind]
        seconds = program.cycles(loop.body) * flops_a_cycle / flops_a_second
        return [f"{1e3 * seconds:.2f}"]
    peak, bandwidth = GPUS[kind]
    costs = program.kernel_costs(loop.body)
    seconds = sum(max(flops / peak, moved / bandwidth) for flops, moved in costs)
    kernels = program.kernels(loop.body)
    convolutions = sum("cudnn$conv" in line for line in kernels)
    return [f"{1e3 * seconds:.2f}", str(len(kernels)), str(convolutions)]


def main(argv: list[str]) -> None:
    flags = parser().parse_args(argv)
    rows, kind = flags.rows.split(","), flags.target.partition(":")[0]
    for row in rows:
        check_choice("--rows", row, ROWS)
    on = device(flags.target)
    table = Table(title=f"one PGD step on {flags.target}: compiled, not measured")
    table.add_column("network")
    columns = ["images a chip", "ms"]
    columns += ["kernels", "convolutions"] if kind in GPUS else []
    for title in (*columns, "compilation, s"):
        table.add_column(title, justify="right")
    for row in rows:
        begin = time.perf_counter()
        found = figures(compiled_loop(row, on), kind)
        seconds = time.perf_counter() - begin
        table.add_row(row, str(ROWS[row][1]), *found, f"{seconds:.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        options.fail(error)
