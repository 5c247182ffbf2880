"""AutoAttack end to end: ours against torchattacks' in PyTorch, one small network.

    python benchmarks/autoattack.py --workdir=WORKDIR
    python benchmarks/autoattack.py --weights=STATE_DICT.npz --images=IMAGES.npz

WORKDIR holds a WideResNet trained here; its test images and the threat of
`config.evaluate.attack` are used. STATE_DICT.npz holds a CIFAR WideResNet's PyTorch
state dict (CIFAR normalisation is added inside), IMAGES.npz `images` [N, H, W, C] float
in [0, 1] and `labels` [N]; the threat is then Linf 8/255.

Both sides run the standard ensemble of Croce and Hein (2020): 100 steps of APGD and
FAB, 9 targets, 5,000 queries of Square. torchattacks ships with 10 steps: --steps=10
gives both sides those. Each side runs in a process of its own, in turns. Ours compiles
anew in every repeat; both clocks of that are told apart from the run.
"""

import dataclasses
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import options
from autoattack_sides import ATTACKS, Ours, Task, Torch
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from workers import Worker

from atebm_jax import checkpoint, convert, data
from atebm_jax import config as configuration
from atebm_jax.errors import UserError

MEAN = (0.4913997551666284, 0.48215855929893703, 0.4465309133731618)
STD = (0.24703225141799082, 0.24348516474564, 0.26158783926049628)
LINF = ("linf", 8 / 255)


def parser() -> options.Parser:
    flags = options.Parser(description=__doc__.partition("\n")[0])
    flags.add_argument("--workdir", default="", help="a WideResNet trained here")
    flags.add_argument("--weights", default="", help="state dict, .npz")
    flags.add_argument("--images", default="", help="images and labels, .npz")
    flags.add_argument("--num", type=options.positive, default=128, help="images")
    flags.add_argument("--norm", choices=("linf", "l2"), help="default: the data's")
    flags.add_argument("--epsilon", type=float, help="default: the data's")
    flags.add_argument("--steps", type=options.positive, default=100)
    flags.add_argument("--queries", type=options.positive, default=5000, help="Square")
    flags.add_argument("--batch_size", type=options.positive, default=8)
    flags.add_argument("--torch_batch_size", type=options.positive, default=128)
    flags.add_argument("--threads", type=options.positive, default=1, help="CPUs")
    flags.add_argument(
        "--devices", type=options.positive, default=1, help="ours: virtual devices"
    )
    flags.add_argument(
        "--memory_format",
        choices=("contiguous_format", "channels_last"),
        default="channels_last",
        help="PyTorch's",
    )
    flags.add_argument("--repeats", type=options.positive, default=3)
    flags.add_argument(
        "--count",
        action="store_true",
        help="count passes through the network, ours in one more run",
    )
    flags.add_argument("--only", choices=("ours", "torch"), help="one side only")
    flags.add_argument("--json", default="", metavar="PATH", help="write all repeats")
    return flags


def main(argv: list[str]) -> None:
    flags = parser().parse_args(argv)
    ours = load(flags)
    theirs = dataclasses.replace(ours, batch_size=flags.torch_batch_size)
    sides: dict[str, tuple[Any, Task]] = {
        "ours": (Ours, ours),
        "torch": (Torch, theirs),
    }
    if flags.only:
        sides = {flags.only: sides[flags.only]}
    workers = {
        name: Worker(build, task, flags.threads)
        for name, (build, task) in sides.items()
    }
    versions = {name: worker.call("version") for name, worker in workers.items()}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for repeat in range(flags.repeats):
        order = list(workers) if repeat % 2 == 0 else list(workers)[::-1]
        for name in order:
            runs[name].append(workers[name].call("run", repeat))
    passes = {
        name: worker.call("count") if flags.count else {}
        for name, worker in workers.items()
    }
    for worker in workers.values():
        worker.close()
    record = {
        "command": options.command(),
        "machine": options.machine(),
        "versions": versions,
        "flags": vars(flags),
        "threat": [ours.norm, ours.epsilon],
        "network": ours.network,
        "images": list(ours.images.shape),
        "passes": passes,
        "runs": runs,
    }
    options.write_json(flags.json, record)
    show(record)


def load(flags: Any) -> Task:
    """What the flags mean.

    Raises:
      UserError: neither or both kinds of source, or one that does not fit.
    """
    if bool(flags.workdir) == bool(flags.weights and flags.images):
        raise UserError("give either --workdir, or --weights and --images.")
    network, weights, (images, labels), threat = (
        _of_workdir(flags.workdir, flags.num)
        if flags.workdir
        else _of_arrays(flags.weights, flags.images, flags.num)
    )
    return Task(
        network,
        weights,
        images,
        labels,
        flags.norm or threat[0],
        threat[1] if flags.epsilon is None else flags.epsilon,
        flags.steps,
        flags.queries,
        flags.batch_size,
        flags.threads,
        flags.devices,
        flags.memory_format,
    )


# Arguments of the network, its state dict, images and labels, threat.
Loaded = tuple[
    dict[str, Any],
    dict[str, np.ndarray],
    tuple[np.ndarray, np.ndarray],
    tuple[str, float],
]


def _of_workdir(path: str, num: int) -> Loaded:
    variables, meta = checkpoint.load_weights(path)
    config = ConfigDict(configuration.complete(meta["config"]))
    model, attack = config.model, config.evaluate.attack
    if model.name != "wide_resnet":
        raise UserError(
            f"{path} holds a {model.name}: the PyTorch side has WideResNets only."
        )
    images, labels = data.materialise(
        data.open_source(config.data.test, config.data.data_dir),
        config.data.preprocess,
        tuple(config.data.image_shape),
        num,
    )
    network = {
        "depth": model.depth,
        "widen_factor": model.widen_factor,
        "num_classes": model.num_classes,
        "channels": config.data.image_shape[2],
        "mean": tuple(model.mean),
        "std": tuple(model.std),
        "activation": model.activation,
    }
    return (
        network,
        convert.to_torch(model.name, variables),
        (images.astype(np.float32) / np.float32(255), labels),
        (attack.norm, float(attack.epsilon)),
    )


def _of_arrays(weights_path: str, images_path: str, num: int) -> Loaded:
    arrays = []
    for path in (weights_path, images_path):
        if not Path(path).is_file():
            raise UserError(f"there is no file {path}: give an .npz as --help says.")
        with np.load(path) as file:
            arrays.append(dict(file))
    weights, images = arrays
    if "fc.bias" not in weights or not {"images", "labels"} <= set(images):
        raise UserError(
            f"{weights_path} must hold a WideResNet's state dict and {images_path} "
            "`images` and `labels`."
        )
    blocks = [re.match(r"block1\.layer\.(\d+)\.", name) for name in weights]
    count = 1 + max(int(match[1]) for match in blocks if match)
    network = {
        "depth": 6 * count + 4,
        "widen_factor": weights["bn1.weight"].size // 64,
        "num_classes": weights["fc.bias"].size,
        "channels": images["images"].shape[3],
        "mean": MEAN,
        "std": STD,
    }
    return network, weights, (images["images"][:num], images["labels"][:num]), LINF


def show(record: dict[str, Any]) -> None:
    """Prints the totals, the attacks one by one, and the ratios."""
    console = Console(
        width=None if sys.stdout.isatty() else 120, highlight=False, markup=False
    )
    console.print(record["command"], soft_wrap=True)
    flags, network, (norm, epsilon) = (
        record[key] for key in ("flags", "network", "threat")
    )
    number, *shape = record["images"]
    console.print(", ".join(record["versions"].values()), soft_wrap=True)
    console.print(
        f"WRN-{network['depth']}-{network['widen_factor']}, {number} images of "
        f"{'x'.join(map(str, shape))}, {norm} {epsilon:.4g}, {flags['steps']} steps, "
        f"{flags['queries']} queries, "
        f"{flags['threads']} thread(s), {flags['repeats']} repeats",
        soft_wrap=True,
    )
    console.print(_totals(record["runs"]))
    console.print(_parts(record["runs"], record["passes"]))
    if len(record["runs"]) == 2:
        for clock in ("cpu", "wall"):
            for extra in (0, 1):
                console.print(_ratio(record["runs"], clock, extra))


def _totals(runs: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table("")
    titles = ("run, CPU s", "run, s", "compilation, CPU s", "compilation, s")
    for title in titles:
        table.add_column(title, justify="right")
    for name, repeats in runs.items():
        keys = ("cpu", "wall", "compile_cpu", "compile_wall")
        table.add_row(name, *(_range([run[key] for run in repeats]) for key in keys))
    return table


def _parts(
    runs: dict[str, list[dict[str, Any]]], passes: dict[str, dict[str, dict[str, int]]]
) -> Table:
    """CPU seconds, who is left, and images through the network where counted."""
    table = Table("")
    for name in runs:
        counted = ("forward", "backward") if passes[name] else ()
        for title in ("CPU s", "robust", *counted):
            table.add_column(f"{name} {title}", justify="right")
    for attack in ATTACKS:
        row = []
        for name, repeats in runs.items():
            robust = sorted({run["robust"].get(attack, 0) for run in repeats})
            row += [
                f"{statistics.median(run['parts'][attack] for run in repeats):.1f}",
                ", ".join(map(str, robust)),
            ]
            if passes[name]:
                seen = passes[name][attack]
                row += [f"{seen.get(k, 0):,}" for k in ("forward", "backward")]
        table.add_row(attack, *row)
    return table


def _range(values: list[float]) -> str:
    middle = f"{statistics.median(values):.1f}"
    if len(values) == 1:
        return middle
    return f"{middle} [{min(values):.1f}, {max(values):.1f}]"


def _ratio(runs: dict[str, list[dict[str, Any]]], clock: str, extra: int) -> str:
    ratios = [
        theirs[clock] / (mine[clock] + extra * mine[f"compile_{clock}"])
        for mine, theirs in zip(runs["ours"], runs["torch"], strict=True)
    ]
    what = "with compilation" if extra else "without compilation"
    low, high = min(ratios), max(ratios)
    return (
        f"torch / ours, {clock} seconds {what}: "
        f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        options.fail(error)
