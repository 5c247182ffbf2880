"""Ways to write the stage-2 step, side by side: what each costs in time and memory.

    python benchmarks/choices.py --model=16/2 --batch_size=32 --steps=10

* as it is: contrastive, real and adversarial images in one forward pass;
* apart: a pass for each of the three;
* remat: every block's activations computed again (`config.model.remat`);
* unrolled: two steps of PGD in a turn of its loop, T fixed when compiled;
* channels first: only convolutions, those of a block in NCHW against NHWC.

Each way runs in a process of its own, pinned to `--threads` CPUs; they take turns.
Medians; ratios are medians over pairs of repeats.
"""

import os
import statistics
import sys
from typing import Any

import options
from jax_side import JaxSide
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from sides import MEASURED, Settings, timed
from step import configure
from workers import Worker

from atebm_jax.errors import UserError

_CHANNELS, _PIXELS, _CONVOLUTIONS, _TURNS = 64, 32, 2, 3


class Side(JaxSide):
    """Our step, with the workspace that its program asks for."""

    def workspace(self) -> int:
        """Bytes beside arguments and results."""
        return self._step.memory_analysis().temp_size_in_bytes


def apart(settings: Settings) -> Side:
    """Three forward passes in the loss instead of one."""
    from atebm_jax import models

    together = models.one_pass

    def one_by_one(model, variables, batches, *, frozen):
        made = [together(model, variables, [x], frozen=frozen)[0][0] for x in batches]
        return made, variables["batch_stats"]

    models.one_pass = one_by_one
    return Side(settings)


def remat(settings: Settings) -> Side:
    """Activations of blocks computed again, in the loops too."""
    settings.config.model.remat = True
    return Side(settings)


def unrolled(settings: Settings) -> Side:
    """Loops of PGD whose turns make two steps."""
    import jax

    from atebm_jax import ascent

    t_max, as_it_is = settings.config.stage2.t_max, ascent.climb

    def climb(objective, images, rule=ascent.PGD, *, step_size, num_steps, **options):
        if options.get("keep_best"):
            steps = {"step_size": step_size, "num_steps": num_steps}
            return as_it_is(objective, images, rule, **steps, **options)
        gradient = jax.grad(lambda x: objective(x).sum())
        project = options.get("project", ascent.clip)

        def ascend(_: Any, carry: Any) -> Any:
            x, memory = carry
            moved, memory = rule.move(None, x, gradient(x), memory, step_size)
            return project(moved), memory

        count = num_steps if isinstance(num_steps, int) else t_max
        first = (images, rule.init(images))
        return jax.lax.fori_loop(0, count, ascend, first, unroll=2)[0]

    ascent.climb = climb
    return Side(settings)


SIDES = {"as it is": Side, "apart": apart, "remat": remat, "unrolled": unrolled}


class Convolutions:
    """A chain of 3x3 convolutions and swish, in one layout."""

    def __init__(self, settings: tuple[str, int, str]):
        import jax
        import jax.numpy as jnp
        from jax import lax

        layout, batch_size, dtype = settings
        first = layout == "NCHW"
        shape = (batch_size, _PIXELS, _PIXELS, _CHANNELS)
        images = jnp.ones((shape[0], shape[3], *shape[1:3]) if first else shape, dtype)
        window = (_CHANNELS, _CHANNELS, 3, 3) if first else (3, 3, _CHANNELS, _CHANNELS)
        kernel = jnp.full(window, 1 / (9 * _CHANNELS), dtype)
        names = (layout, "OIHW" if first else "HWIO", layout)

        def chain(x, kernel):
            for _ in range(_CONVOLUTIONS):
                x = lax.conv_general_dilated(
                    jax.nn.swish(x), kernel, (1, 1), "SAME", dimension_numbers=names
                )
            return x

        def loop(x, kernel):
            return lax.fori_loop(0, _TURNS, lambda _, x: chain(x, kernel), x)

        program = jax.jit(loop).lower(images, kernel).compile()
        self._run = lambda: program(images, kernel).block_until_ready()

    def run(self) -> tuple[float, float]:
        """One repeat: (wall seconds, CPU seconds)."""
        return timed(self._run)


def main(argv: list[str]) -> None:
    flags, config = options.parse(options.of_a_step(__doc__.partition("\n")[0]), argv)
    configure(config, flags)
    record = {
        "command": options.command(),
        "machine": options.machine(),
        "step": measure(config, flags),
        "layout": measure_layouts(config, flags),
    }
    options.write_json(flags.json, record)
    show(record, config, flags)


def measure(config: ConfigDict, flags: Any) -> dict[str, Any]:
    """Seconds of loop and step, compilation and workspace, for each way."""
    settings = Settings(config, flags.device, flags.threads, flags.form)
    workers = {
        name: Worker(build, settings, flags.threads) for name, build in SIDES.items()
    }
    try:
        variables = workers["as it is"].call("weights")
        made = {
            name: {
                "compile_s": worker.call("prepare", variables)["compile_s"]["step"],
                "workspace": worker.call("workspace"),
                **{what: [] for what in MEASURED},
            }
            for name, worker in workers.items()
        }
        names = list(workers)
        for repeat in range(flags.repeats + 1):
            for what in MEASURED:
                for name in names if repeat % 2 == 0 else names[::-1]:
                    seconds = workers[name].call("run", what)
                    # The first one warms up.
                    if repeat > 0:
                        made[name][what].append(seconds)
    finally:
        for worker in workers.values():
            worker.close()
    return made


def measure_layouts(config: ConfigDict, flags: Any) -> dict[str, list]:
    """Seconds of the chain of convolutions in either layout."""
    size = (flags.batch_size, config.model.dtype)
    workers = {
        layout: Worker(Convolutions, (layout, *size), flags.threads)
        for layout in ("NHWC", "NCHW")
    }
    try:
        times = {
            layout: [worker.call("run") for _ in range(flags.repeats + 1)][1:]
            for layout, worker in workers.items()
        }
    finally:
        for worker in workers.values():
            worker.close()
    return times


def show(record: dict[str, Any], config: ConfigDict, flags: Any) -> None:
    """Prints both tables."""
    console = Console(
        width=None if sys.stdout.isatty() else 140, highlight=False, markup=False
    )
    size = config.data.image_shape[0]
    console.print(
        f"{record['machine']['cpu']}, {config.model.name} at {size} pixels, "
        f"{config.model.dtype}, batch {flags.batch_size}, T {flags.steps}, "
        f"{flags.threads} thread(s), {flags.repeats} repeats"
    )
    # A device other than the CPU works while the CPU waits.
    clock = 1 if flags.device == "cpu" else 0
    table = Table(title=f"{('wall', 'CPU')[clock]} seconds, ratio to the first row")
    for title in ("", "loop", "ratio", "step", "ratio", "compile s", "workspace MiB"):
        table.add_column(title, justify="right" if title else "left")
    base = record["step"]["as it is"]
    for name, row in record["step"].items():
        cells = []
        for what in MEASURED:
            own, others = ([t[clock] for t in r[what]] for r in (row, base))
            cells += [f"{statistics.median(own):.3f}", _ratio(own, others)]
        workspace = f"{row['workspace'] / 2**20:.0f}"
        table.add_row(name, *cells, f"{row['compile_s']:.1f}", workspace)
    console.print(table)
    chains = {
        layout: [t[clock] for t in times] for layout, times in record["layout"].items()
    }
    seconds = ", ".join(f"{k} {statistics.median(t):.3f} s" for k, t in chains.items())
    console.print(
        f"{_CONVOLUTIONS} convolutions of {_CHANNELS} channels at {_PIXELS} pixels, "
        f"{_TURNS} turns of a loop: {seconds}, ratio "
        f"{_ratio(chains['NCHW'], chains['NHWC'])}"
    )


def _ratio(own: list[float], base: list[float]) -> str:
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    return f"{statistics.median(ratios):.2f}"


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        main(sys.argv[1:])
    except UserError as mistake:
        options.fail(mistake)
