"""Training steps, and turns of their loops, as the compilers of TPUs and GPUs see them.

    python benchmarks/targets.py --json=targets.json --markdown
    python benchmarks/targets.py --json=targets.json --images_a_chip=2,8,16,64,128
    python benchmarks/targets.py --loops=resnet50,wrn34_10 --targets=v5e:2x4

The first compiles stage 2 of every row of the configs for every target and prints the
table of docs/cost.md: memory, speed, and hours to the end of the row's budget; where a
step does not fit, with the least costly change that makes it. Rows that differ in the
numbers of their curriculum alone are compiled once. The second compiles the
rows for one chip, with so many images of each stream on it. What the file has is not
compiled again: a stopped command goes on. Steps of large networks take minutes each.

The third is one turn of the contrastive loop of a network in bfloat16: a TPU's time by
the cycles that its compiler estimates; of a GPU the kernels that a turn launches too.
`--images_a_chip` gives it other batches.

Nothing here is measured on a device. It needs a compiler: the extras `target-tpu` and
`target-gpu`.
"""

import argparse
import functools
import itertools
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import options
from rich.console import Console
from rich.table import Table

from atebm_jax import (
    archs,
    ascent,
    dry_run,
    energy,
    hlo,
    models,
    presets,
    sharding,
    target_costs,
    target_programs,
    target_run,
    targets,
)
from atebm_jax.command_line import load_config
from atebm_jax.errors import UserError, check_choice
from atebm_jax.progress import say

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = ("imagenet256", "cifar10", "cifar100")
# Rows for CPUs, those that compare methods among them, and one that only tries the
# commands.
NOT_FOR_TARGETS = ("cpu", "noise", "hour", "smoke", "dat", *presets.METHODS)
TARGETS = "v5e:2x4,v5e:4x4,v6e:2x4,v5p:2x2x1,h100:8"
#: Of loops: pixels a side, and images a chip where no flag says how many.
LOOPS = {
    "wrn16_4": (32, 128),
    "wrn34_10": (32, 128),
    "resnet50": (256, 16),
    "wide_resnet50_4": (256, 16),
    "convnext_large_cvst": (256, 16),
}
COMPILED = "*compiled*"


def parser() -> options.Parser:
    flags = options.Parser(description=__doc__.partition("\n")[0])
    flags.add_argument("--targets", default=TARGETS, help="as of main's --target")
    flags.add_argument(
        "--rows", default="", help="as imagenet256:resnet50_t30; default: all"
    )
    flags.add_argument("--json", default="", help="what is compiled, kept here")
    flags.add_argument("--markdown", action="store_true", help="print only the table")
    flags.add_argument(
        "--images_a_chip",
        type=options.listed(options.positive),
        default=(),
        help="compile for one chip of each kind, with so many images (of each stream)",
    )
    flags.add_argument("--loops", default="", help="of these networks, one turn each")
    return flags


def rows(wanted: str) -> list[str]:
    """Names of rows, FILE:ROW.

    Raises:
      UserError: a row that no config has.
    """
    known = []
    for file in FILES:
        table = runpy.run_path(str(CONFIGS / f"{file}.py"))["ROWS"]
        names = [name for name in table if name not in NOT_FOR_TARGETS]
        known += [f"{file}:{name}" for name in names]
    chosen = wanted.split(",") if wanted else known
    for row in chosen:
        check_choice("--rows", row, known)
    return chosen


def steps(flags: argparse.Namespace) -> None:
    """Compiles what the file lacks, and prints the table."""
    if not flags.json:
        raise UserError("--json is missing: give a file for what is compiled.")
    path = Path(flags.json)
    kept = options.read_json(path) if path.exists() else {}
    console = Console(stderr=True)
    for row in rows(flags.rows):
        for target in flags.targets.split(","):
            for images in flags.images_a_chip or (0,):
                name = f"{row} {target}" + (f" {images}" if images else "")
                if name in kept or flags.markdown:
                    continue
                console.rule(name)
                alike = (
                    f"{other} {name.partition(' ')[2]}"
                    for other in rows("")
                    if program_of(other) == program_of(row)
                )
                found = next((other for other in alike if other in kept), None)
                try:
                    if found:
                        made = with_curriculum(row, images, kept[found])
                        kept[name] = made | {"compiled_as": found}
                    else:
                        kept[name] = compiled(row, target, images, console)
                except target_programs.CompilerFailure as error:
                    say(console, str(error))  # another one may do it
                    continue
                options.write_json(flags.json, kept)
    (print_chips if flags.images_a_chip else print_table)(kept)


@functools.cache
def config_of(row: str, images: int = 0) -> ml_collections.FrozenConfigDict:
    """A row that runs stage 2; of so many images on one chip, if any."""
    file, _, name = row.partition(":")
    config = load_config(f"{CONFIGS / file}.py:{name}")
    config.stages, config.init_from = "stage2", config.init_from or "weights"
    if images:
        config.stage2.batch_size = images
        config.mesh = "data:-1"
    return ml_collections.FrozenConfigDict(config)


def program_of(row: str) -> ml_collections.ConfigDict:
    """What the compiled step of a row depends on, but for its curriculum's numbers."""
    config = ml_collections.ConfigDict(config_of(row))
    config.stage2.update(t_max=0, auc_threshold=0.0)
    del config.evaluate, config.stage1
    return config


def with_curriculum(row: str, images: int, figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of a row, of those of another one with the same program."""
    config = config_of(row, images)
    cost = dry_run.measure(config, "stage2")
    flops = functools.partial(cost.step_flops, config.stage2.batch_size)

    def told(made: dict[str, Any]) -> dict[str, Any]:
        if "step" not in made:
            return made
        target = targets.parse(made["target"])
        most = made["devices"] * target_costs.peak(target, config.model.dtype)
        at = target_run.steps(config, "stage2", made["seconds"], flops, most)
        return made | {"step": at}

    return told(figures) | {"remedies": [told(made) for made in figures["remedies"]]}


def compiled(row: str, target: str, images: int, console: Console) -> dict[str, Any]:
    """The figures of stage 2 of a row; of so many images on one chip, if any."""
    config = ml_collections.ConfigDict(config_of(row, images))
    if images:
        kind = targets.parse(target).kind
        target = f"{kind}:1" if kind in ("a100", "h100", "h200") else f"{kind}:1x1"
    return target_run.run(config, target, console=console)["stage2"]


def print_table(kept: dict[str, Any]) -> None:
    """One line a row and target: the best setting that fits, in Markdown."""
    print(
        f"| row | target | setting | GiB a device of | images/s at T = 0 | at T_max | "
        f"peak at T_max | hours to the end | |\n|{'---|' * 3}{'---:|' * 5}---|"
    )
    shown = []
    there = (f"{row} {target}" for row in rows("") for target in TARGETS.split(","))
    for name in dict.fromkeys([*there, *kept]):
        if name not in kept or name.count(" ") > 1:
            continue
        row, target = name.split(" ")
        figures = kept[name]
        best = [figures, *figures["remedies"]]
        best = [made for made in best if made["fits"]] or [figures]
        made = best[0]
        memory = made["memory_bytes"]
        cells = [f"`{row}`", target, _setting(made)]
        sizes = (memory[kind] / dry_run.GIB for kind in ("needed", "available"))
        cells.append("{:.1f} of {:.1f}".format(*sizes))
        first, *_, last = [*made.get("step", {"": {}}).values()] * 2
        cells += [_number(at, "images_per_second") for at in (first, last)]
        cells.append(f"{last['share_of_peak']:.0%}" if last else "")
        hours = [_number(at, "hours_of_the_budget") for at in (first, last)]
        cells += [" to ".join(hours) if last else "does not fit", COMPILED]
        print("| " + " | ".join(cells) + " |")
        shown.append(figures)
    print_versions(shown)


def print_versions(shown: list[dict[str, Any]]) -> None:
    """One line: of what the figures say that they were compiled with."""
    told = [
        ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
        for figures in shown
        if "versions" in figures
    ]
    if told:
        print(f"\nCompiled with {'; '.join(dict.fromkeys(told))}.")


def _setting(made: dict[str, Any]) -> str:
    return f"`{made['flags']}`" if "flags" in made else "as it is"


def _number(at: dict[str, float], name: str) -> str:
    value = at.get(name)
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def print_chips(kept: dict[str, Any]) -> None:
    """Images a second and chip at T_max, one line a row and kind, in Markdown."""
    found: dict[str, dict[int, str]] = {}
    shown = []
    place = {row: place for place, row in enumerate(rows(""))}
    names = [name.split(" ") for name in kept if name.count(" ") == 2]
    for row, target, images in sorted(names, key=lambda n: place.get(n[0], len(place))):
        figures = kept[f"{row} {target} {images}"]
        shown.append(figures)
        *_, last = figures.get("step", {"": {}}).values()
        cell = _number(last, "images_per_second") if figures["fits"] else "too large"
        key = f"`{row}` | {target.partition(':')[0]}"
        found.setdefault(key, {})[int(images)] = cell
    numbers = sorted({n for cells in found.values() for n in cells})
    titles = " | ".join(f"{n}" for n in numbers)
    print(f"| row | chip | {titles} | |\n|---|---|{'---:|' * len(numbers)}---|")
    for key, cells in found.items():
        told = " | ".join(cells.get(n, "") for n in numbers)
        print(f"| {key} | {told} | {COMPILED} |")
    print_versions(shown)


def compiled_loop(network: str, on: Any, batch: int) -> hlo.Program:
    """The contrastive loop of a network and a batch on one chip."""
    side, _ = LOOPS[network]
    model = models.build(archs.model_config(network, dtype="bfloat16"))
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
    placed = sharding.shapes_at(arguments, place)
    return hlo.Program(jax.jit(loop).lower(*placed).compile().as_text())


def loops(flags: argparse.Namespace) -> None:
    """Prints milliseconds, and a GPU's kernels and convolutions, of one turn each."""
    networks = flags.loops.split(",")
    for network in networks:
        check_choice("--loops", network, LOOPS)
    for name in flags.targets.split(","):
        target = targets.parse(name)
        on = targets.devices(target)[0]
        table = Table(title=f"one PGD step on {name}: compiled, not measured")
        table.add_column("network")
        columns = ["images a chip", "ms"]
        columns += ["kernels", "convolutions"] if target.is_gpu else []
        for title in (*columns, "compilation, s"):
            table.add_column(title, justify="right")
        for network, batch in itertools.product(networks, flags.images_a_chip or (0,)):
            begin, batch = time.perf_counter(), batch or LOOPS[network][1]
            program = compiled_loop(network, on, batch)
            (loop,) = program.loops()
            estimate = target_costs.estimate(program, target, "bfloat16")
            seconds = program.total(estimate, name=loop.body)
            cells = [str(batch), f"{1e3 * seconds:.2f}"]
            if target.is_gpu:
                kernels = program.kernels(loop.body)
                cells.append(str(len(kernels)))
                cells.append(str(sum("cudnn$conv" in line for line in kernels)))
            table.add_row(network, *cells, f"{time.perf_counter() - begin:.0f}")
        Console(width=100).print(table)


def main(argv: list[str]) -> None:
    flags = parser().parse_args(argv)
    targets.only_compile()
    (loops if flags.loops else steps)(flags)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        options.fail(error)
