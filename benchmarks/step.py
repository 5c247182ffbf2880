"""Speed of the inner loop and of a full stage-2 step, against PyTorch or ourselves.

    python benchmarks/step.py --model=16/2 --dtype=float32 --batch_size=32 --steps=10

Both sides run in processes of their own, pinned to as many CPUs as threads, and take
turns, repeat by repeat. Before that they must agree on the images and on two training
steps from the same weights. Times are medians, ratios medians over pairs of repeats.
"""

import importlib.util
import os
import sys
from typing import Any

import agreement
import options
from jax_side import JaxSide
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from sides import MEASURED, Settings
from workers import Worker, available_cpus

from atebm_jax import archs, dry_run, models, sharding
from atebm_jax.config import flatten
from atebm_jax.errors import UserError

CLOCKS = ("wall_s", "cpu_s")
TORCH_LAYOUTS = {"channels_last": "channels_last", "default": "contiguous_format"}
TITLES = {"loop": "contrastive loop", "step": "stage-2 step"}


def parser() -> options.Parser:
    flags = options.of_a_step(__doc__.partition("\n")[0])
    flags.add_argument(
        "--compare",
        choices=("torch", "forms", "none"),
        default="torch",
        help="ours against PyTorch, our two forms of operations, or ours alone",
    )
    flags.add_argument(
        "--torch_layout",
        choices=tuple(TORCH_LAYOUTS),
        default="channels_last",
        help="memory format: PyTorch's faster one, or the one it has by default",
    )
    flags.add_argument(
        "--torch_compile", action="store_true", help="run PyTorch's network compiled"
    )
    flags.add_argument(
        "--cpu_devices",
        type=options.positive,
        default=1,
        help="our side's, which share the CPUs of --threads and the batch",
    )
    flags.add_argument(
        "--peak",
        action="store_true",
        help="measure the device's matrix products too, and ours as a share of them",
    )
    return flags


def main(argv: list[str]) -> None:
    flags, config = options.parse(parser(), argv)
    configure(config, flags)
    if flags.cpu_devices > 1 and flags.device != "cpu":
        raise UserError(f"--cpu_devices={flags.cpu_devices} needs --device=cpu.")
    sharding.check_batch_size(flags.batch_size, flags.cpu_devices, "--batch_size")
    sides = choose_sides(config, flags)
    workers = {
        name: Worker(build, settings, flags.threads)
        for name, (build, settings) in sides.items()
    }
    try:
        record = measure(workers, config, flags.repeats)
        # Ours is the first side; before --peak, whose products are large.
        ours = next(iter(workers))
        record["sides"][ours]["peak_bytes"] = workers[ours].call("peak_bytes")
        if flags.peak:
            record["peak"] = measure_peak(workers, config, record)
    finally:
        for worker in workers.values():
            worker.close()
    record = {
        "command": options.command(),
        "machine": options.machine(),
        "flags": vars(flags),
        "model": config.model.to_dict(),
        "image_shape": list(config.data.image_shape),
        "stage2": config.stage2.to_dict(),
        **record,
    }
    options.write_json(flags.json, record)
    show(record)


def configure(config: ConfigDict, flags: Any) -> None:
    """Puts the flags into the config, and T where it stays."""
    _choose_network(config, flags.model)
    if flags.image_size:
        channels = config.data.image_shape[2]
        config.data.image_shape = (flags.image_size, flags.image_size, channels)
    if flags.dtype:
        config.model.dtype = flags.dtype
    config.stage2.batch_size = flags.batch_size
    config.stage2.t_max = flags.steps
    models.build(config.model)
    if flags.threads > available_cpus():
        raise UserError(
            f"--threads={flags.threads} is more than the {available_cpus()} CPUs that "
            "this process may use."
        )


def _choose_network(config: ConfigDict, name: str) -> None:
    if name in archs.ARCHS:
        config.model.update(archs.arch(name))
    elif name:
        depth, slash, width = name.partition("/")
        if not (slash and depth.isdecimal() and width.isdecimal()):
            raise UserError(
                f"--model={name} is neither DEPTH/WIDTH nor an architecture: write "
                f"--model=16/2, or one of {', '.join(archs.ARCHS)}."
            )
        config.model.update(
            name="wide_resnet", depth=int(depth), widen_factor=int(width)
        )


def choose_sides(config: ConfigDict, flags: Any) -> dict[str, tuple[Any, Settings]]:
    """The sides by name, ours first; PyTorch only where the network has a twin."""

    def settings(form: str | None) -> Settings:
        return Settings(
            config,
            device=flags.device,
            threads=flags.threads,
            form=form,
            cpu_devices=flags.cpu_devices,
            memory_format=TORCH_LAYOUTS[flags.torch_layout],
            compile=flags.torch_compile,
        )

    if flags.compare == "forms":
        return {name: (JaxSide, settings(name)) for name in ("cpu", "xla")}
    ours = settings(flags.form)
    sides: dict[str, tuple[Any, Settings]] = {"ours": (JaxSide, ours)}
    if flags.compare == "none":
        return sides
    if _has_twin(config, flags):
        from torch_side import TorchSide

        sides["torch"] = (TorchSide, ours)
    return sides


def _has_twin(config: ConfigDict, flags: Any) -> bool:
    """Whether PyTorch can be measured; says so where only the network lacks there."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            "PyTorch is not installed: install the extra atebm_jax[bench], or choose "
            "--compare=none."
        )
    if flags.device == "tpu":
        raise UserError(
            "PyTorch is not measured on TPU: choose --compare=forms or none."
        )
    from torch_side import SUPPORTED, TWINS

    fields = dict(flatten(config.stage2))
    for field, value in SUPPORTED.items():
        if fields[field] != value:
            raise UserError(
                f"the PyTorch side knows only config.stage2.{field}={value!r}: choose "
                "that, or --compare=none."
            )
    if config.model.name not in TWINS:
        print(
            f"note: {config.model.name!r} has no PyTorch twin (there are "
            f"{', '.join(TWINS)}): ours alone is measured.",
            file=sys.stderr,
        )
    return config.model.name in TWINS


def measure(
    workers: dict[str, Worker], config: ConfigDict, repeats: int
) -> dict[str, Any]:
    """Prepares all sides, compares their results, then times them in turn."""
    names = list(workers)
    # PyTorch cannot read our weights, but we can read its: the last side gives them.
    variables = workers[names[-1]].call("weights")
    prepared = {name: workers[name].call("prepare", variables) for name in names}
    results = {name: workers[name].call("check") for name in names}
    record: dict[str, Any] = {"sides": prepared}
    if len(names) > 1:
        ours, other = results.values()
        differences = agreement.compare(ours, other, variables["params"], config)
        record["agreement"] = differences
        agreement.check(differences, config)
    times: dict[str, Any] = {
        name: {what: {clock: [] for clock in CLOCKS} for what in MEASURED}
        for name in names
    }
    for repeat in range(repeats):
        for what in MEASURED:
            # Whoever goes first finds other caches: they take turns in that too.
            for name in names if repeat % 2 == 0 else names[::-1]:
                for clock, value in zip(CLOCKS, workers[name].call("run", what)):
                    times[name][what][clock].append(value)
    for name in names:
        prepared[name]["times"] = times[name]
    record["summary"] = {what: _summary(times, what) for what in MEASURED}
    return record


def measure_peak(
    workers: dict[str, Worker], config: ConfigDict, record: dict[str, Any]
) -> dict[str, float]:
    """TFLOP/s of large matrix products and of our loop, and the share in between.

    A loop's FLOPs are XLA's count of one image gradient, a multiply-add being two.
    """
    name, worker = next(iter(workers.items()))
    flops = dry_run.measure(config, "stage2").flops["contrastive step"]
    flops *= config.stage2.batch_size * config.stage2.t_max
    peak = worker.call("peak")
    reached = flops / record["summary"]["loop"][name]["wall_s"]["median"]
    return {
        "matrix_product_tflops": peak / 1e12,
        "loop_tflops": reached / 1e12,
        "share": reached / peak,
    }


def _summary(times: dict[str, Any], what: str) -> dict[str, Any]:
    """Quartiles of each side's times and of the other's over ours."""
    names = list(times)
    summary: dict[str, Any] = {
        name: {clock: options.quartiles(times[name][what][clock]) for clock in CLOCKS}
        for name in names
    }
    if len(names) > 1:
        ours, other = (times[name][what] for name in names)
        summary["ratio"] = {
            clock: options.quartiles(
                [b / a for a, b in zip(ours[clock], other[clock], strict=True)]
            )
            for clock in CLOCKS
        }
    return summary


def show(record: dict[str, Any]) -> None:
    """Prints what was compared, the agreement and one table."""
    # A pipe has no width: the table keeps its own.
    console = Console(
        width=None if sys.stdout.isatty() else 140, highlight=False, markup=False
    )
    names, flags = list(record["sides"]), record["flags"]
    versions = [
        f"{name} {version}"
        for side in record["sides"].values()
        for name, version in side["versions"].items()
    ]
    device = record["machine"]["cpu"]
    if flags["device"] != "cpu":
        device = record["sides"][names[0]]["device"]
    console.print(f"{device}, {', '.join(dict.fromkeys(versions))}")
    console.print(
        f"{_network(record['model'])}, {record['image_shape'][0]} pixels, "
        f"{record['model']['dtype']}, batch {flags['batch_size']}, T {flags['steps']}, "
        f"{flags['threads']} thread(s), {flags['repeats']} repeats"
    )
    if flags["cpu_devices"] > 1:
        console.print(f"ours on {flags['cpu_devices']} CPU devices")
    if "agreement" in record:
        console.print(agreement.describe(record["agreement"]))
    console.print(_table(record, names))
    if len(names) > 1:
        console.print(f"ratio: {names[1]} / {names[0]}, median [quartiles]")
    for what in MEASURED:
        speeds = [
            f"{name} {flags['batch_size'] / times['wall_s']['median']:,.4g}"
            for name, times in record["summary"][what].items()
            if name != "ratio"
        ]
        console.print(f"images a second, {TITLES[what]}: {', '.join(speeds)}")
    if "peak" in record:
        peak = record["peak"]
        console.print(
            f"matrix products {peak['matrix_product_tflops']:.3g} TFLOP/s, contrastive "
            f"loop {peak['loop_tflops']:.3g}: {100 * peak['share']:.0f} %"
        )


def _network(model: dict[str, Any]) -> str:
    if model["name"] == "wide_resnet":
        return f"WRN-{model['depth']}-{model['widen_factor']}"
    return archs.describe(ConfigDict(model))


def _table(record: dict[str, Any], names: list[str]) -> Table:
    table = Table()
    table.add_column("")
    for name in names:
        for unit in ("wall s", "CPU s", "compile s"):
            table.add_column(f"{name}\n{unit}", justify="right")
    if len(names) > 1:
        for clock in ("wall", "CPU"):
            table.add_column(f"ratio\n{clock}", justify="right")
    for what in MEASURED:
        summary, row = record["summary"][what], [TITLES[what]]
        for name in names:
            row += [f"{summary[name][clock]['median']:.3f}" for clock in CLOCKS]
            row.append(f"{record['sides'][name]['compile_s'][what]:.1f}")
        for clock in CLOCKS if len(names) > 1 else ():
            ratio = summary["ratio"][clock]
            row.append(f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]")
        table.add_row(*row)
    return table


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        main(sys.argv[1:])
    except UserError as mistake:
        options.fail(mistake)
