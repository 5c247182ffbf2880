"""AutoAttack end to end: ours against torchattacks' in PyTorch, one small network.

    python benchmarks/autoattack.py --weights=STATE_DICT.npz --images=IMAGES.npz

STATE_DICT.npz holds a CIFAR WideResNet's PyTorch state dict (CIFAR normalisation is
added inside), IMAGES.npz `images` [N, H, W, C] float in [0, 1] and `labels` [N].
Each side runs in a process of its own, pinned to one thread, in turns. Ours compiles
anew in every repeat and says how long; the ratios leave that out unless they say so.
"""

import dataclasses
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import options
from rich.console import Console
from rich.table import Table
from sides import timed
from workers import Worker

from atebm_jax.errors import UserError

MEAN = (0.4913997551666284, 0.48215855929893703, 0.4465309133731618)
STD = (0.24703225141799082, 0.24348516474564, 0.26158783926049628)


@dataclasses.dataclass(frozen=True)
class Task:
    """What both sides attack."""

    weights: dict[str, np.ndarray]
    images: np.ndarray
    labels: np.ndarray
    norm: str
    epsilon: float
    batch_size: int
    memory_format: str

    @property
    def shape(self) -> dict[str, int]:
        """Depth, width and classes, as the weights tell them."""
        blocks = [re.match(r"block1\.layer\.(\d+)\.", name) for name in self.weights]
        count = 1 + max(int(match[1]) for match in blocks if match)
        return {
            "depth": 6 * count + 4,
            "widen_factor": self.weights["bn1.weight"].size // 64,
            "num_classes": self.weights["fc.bias"].size,
        }


class Ours:
    """`atebm_jax.autoattack.run`, standard version."""

    def __init__(self, task: Task):
        import jax

        from atebm_jax import convert, models
        from atebm_jax.models.wide_resnet import WideResNet

        variables = jax.tree.map(
            jax.numpy.asarray, convert.from_torch("wide_resnet", task.weights)
        )
        network = WideResNet(**task.shape, mean=MEAN, std=STD)
        self.logits_fn = models.logits_fn(network, variables)
        self.task = task

    def version(self) -> str:
        """Name and version of the library."""
        import jax

        return f"jax {jax.__version__}"

    def run(self, seed: int) -> dict[str, Any]:
        """One whole ensemble."""
        import jax

        from atebm_jax import autoattack

        task = self.task
        # Every repeat compiles anew, as the first one of a user does.
        jax.clear_caches()
        parts: dict[str, float] = {}
        last = [time.process_time()]

        def note(progress: autoattack.Progress) -> None:
            now = time.process_time()
            name = progress.attack
            parts[name] = parts.get(name, 0.0) + now - last[0]
            last[0] = now

        results: list[autoattack.Result] = []

        def work() -> None:
            result = autoattack.run(
                jax.random.key(seed),
                self.logits_fn,
                task.images,
                task.labels,
                threat=(task.norm, task.epsilon),
                batch_size=task.batch_size,
                on_progress=note,
            )
            results.append(result)

        wall, cpu = timed(work)
        result = results[0]
        return {
            "wall": wall - result.compile_seconds,
            "cpu": cpu - result.compile_seconds,
            "compile": result.compile_seconds,
            "robust": result.robust_accuracy,
            "parts": parts,
        }


class Torch:
    """torchattacks' AutoAttack, standard version, on our PyTorch network."""

    def __init__(self, task: Task):
        import torch
        from torch_reference import WideResNet

        torch.set_num_threads(1)
        model = WideResNet(**task.shape, channels=3, mean=MEAN, std=STD)
        state = {k: torch.from_numpy(v) for k, v in task.weights.items()}
        model.load_state_dict(state, strict=False)
        model.eval().requires_grad_(False)
        self.model = _in_format(model, getattr(torch, task.memory_format))
        self.images = torch.from_numpy(task.images.transpose(0, 3, 1, 2).copy())
        self.labels = torch.from_numpy(task.labels.astype(np.int64))
        self.task = task

    def version(self) -> str:
        """Name and version of the libraries."""
        import torch
        import torchattacks

        return f"torch {torch.__version__}, torchattacks {torchattacks.__version__}"

    def run(self, seed: int) -> dict[str, Any]:
        """One whole ensemble, batch by batch."""
        import torch
        import torchattacks

        task = self.task
        attack = torchattacks.AutoAttack(
            self.model,
            norm={"linf": "Linf", "l2": "L2"}[task.norm],
            eps=task.epsilon,
            version="standard",
            n_classes=task.shape["num_classes"],
            seed=seed,
        )
        robust = []

        def work() -> None:
            for start in range(0, len(self.images), task.batch_size):
                part = slice(start, start + task.batch_size)
                adversarial = attack(self.images[part], self.labels[part])
                with torch.no_grad():
                    predicted = self.model(adversarial).argmax(dim=1)
                robust.append((predicted == self.labels[part]).numpy())

        wall, cpu = timed(work)
        share = float(np.concatenate(robust).mean())
        return {"wall": wall, "cpu": cpu, "compile": 0.0, "robust": share}


def _in_format(model: Any, memory_format: Any) -> Any:
    """The network in a memory format; images and their gradients stay contiguous.

    torchattacks takes views that need contiguous gradients.
    """
    import torch

    class Formatted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.to(memory_format=memory_format)

        def forward(self, images: Any) -> Any:
            if images.requires_grad:
                images.register_hook(lambda gradient: gradient.contiguous())
            return self.model(images.contiguous(memory_format=memory_format))

    return Formatted().eval()


def parser() -> options.Parser:
    flags = options.Parser(description=__doc__.partition("\n")[0])
    flags.add_argument("--weights", required=True, help="state dict, .npz")
    flags.add_argument("--images", required=True, help="images and labels, .npz")
    flags.add_argument("--num", type=options.positive, default=128, help="images")
    flags.add_argument("--norm", choices=("linf", "l2"), default="linf")
    flags.add_argument("--epsilon", type=float, default=8 / 255)
    flags.add_argument("--batch_size", type=options.positive, default=32)
    flags.add_argument("--torch_batch_size", type=options.positive, default=128)
    flags.add_argument(
        "--memory_format",
        choices=("contiguous_format", "channels_last"),
        default="channels_last",
        help="PyTorch's",
    )
    flags.add_argument("--repeats", type=options.positive, default=3)
    flags.add_argument("--only", choices=("ours", "torch"), help="one side only")
    flags.add_argument("--json", default="", metavar="PATH", help="write all repeats")
    return flags


def main(argv: list[str]) -> None:
    flags = parser().parse_args(argv)
    ours = load(flags)
    theirs = dataclasses.replace(ours, batch_size=flags.torch_batch_size)
    sides = {"ours": (Ours, ours), "torch": (Torch, theirs)}
    if flags.only:
        sides = {flags.only: sides[flags.only]}
    workers = {name: Worker(build, task, 1) for name, (build, task) in sides.items()}
    versions = {name: worker.call("version") for name, worker in workers.items()}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for repeat in range(flags.repeats):
        order = list(workers) if repeat % 2 == 0 else list(workers)[::-1]
        for name in order:
            runs[name].append(workers[name].call("run", repeat))
    for worker in workers.values():
        worker.close()
    record = {
        "command": options.command(),
        "machine": options.machine(),
        "versions": versions,
        "flags": vars(flags),
        "runs": runs,
    }
    options.write_json(flags.json, record)
    show(record)


def load(flags: Any) -> Task:
    """Reads weights and images.

    Raises:
      UserError: a file that is missing or lacks an array.
    """
    arrays = []
    for path in (flags.weights, flags.images):
        if not Path(path).is_file():
            raise UserError(f"there is no file {path}: give an .npz as --help says.")
        with np.load(path) as file:
            arrays.append(dict(file))
    weights, data = arrays
    if "fc.bias" not in weights or not {"images", "labels"} <= set(data):
        raise UserError(
            f"{flags.weights} must hold a WideResNet's state dict and {flags.images} "
            "`images` and `labels`."
        )
    return Task(
        weights,
        data["images"][: flags.num],
        data["labels"][: flags.num],
        flags.norm,
        flags.epsilon,
        flags.batch_size,
        flags.memory_format,
    )


def show(record: dict[str, Any]) -> None:
    """Prints the table."""
    console = Console()
    console.print(record["command"], soft_wrap=True)
    console.print(", ".join(record["versions"].values()), soft_wrap=True)
    table = Table("", "run s", "run CPU s", "compile s", "robust accuracy")
    for name, runs in record["runs"].items():
        middle = {
            key: statistics.median(run[key] for run in runs)
            for key in ("wall", "cpu", "compile")
        }
        robust = sorted({f"{run['robust']:.4f}" for run in runs})
        row = [f"{middle[key]:.1f}" for key in middle]
        table.add_row(name, *row, ", ".join(robust))
    console.print(table)
    for run in record["runs"].get("ours", ())[:1]:
        parts = (f"{name} {value:.1f}" for name, value in run["parts"].items())
        console.print("ours, CPU s with compilation:", ", ".join(parts))
    if len(record["runs"]) == 2:
        for key, extra in (("cpu", 0), ("wall", 0), ("cpu", 1), ("wall", 1)):
            console.print(_ratio(record["runs"], key, extra))


def _ratio(runs: dict[str, list[dict[str, Any]]], key: str, extra: int) -> str:
    ratios = [
        theirs[key] / (mine[key] + extra * mine["compile"])
        for mine, theirs in zip(runs["ours"], runs["torch"], strict=True)
    ]
    what = "with compilation" if extra else "without compilation"
    low, high = min(ratios), max(ratios)
    return (
        f"torch / ours, {key} seconds {what}: "
        f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        options.fail(error)
