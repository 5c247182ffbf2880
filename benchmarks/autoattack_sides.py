"""The two sides of `autoattack.py`: `atebm_jax.autoattack.run` and torchattacks.

A side offers `version`, `run` (one whole ensemble, timed) and `count` (how often the
network was evaluated, by attack).
"""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
from sides import timed

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")


@dataclasses.dataclass(frozen=True)
class Task:
    """What both sides attack, and how.

    Attributes:
      network: arguments of `torch_reference.WideResNet`.
      weights: its state dict.
      images: [N, H, W, C] float32 in [0, 1].
      labels: [N] int.
      norm, epsilon: the threat.
      steps: of each search of APGD and FAB.
      queries: of Square.
      batch_size: images at a time.
      threads: CPUs a side is pinned to.
      devices: ours: virtual devices that a batch is split over.
      memory_format: PyTorch's.
    """

    network: dict[str, Any]
    weights: dict[str, np.ndarray]
    images: np.ndarray
    labels: np.ndarray
    norm: str
    epsilon: float
    steps: int
    queries: int
    batch_size: int
    threads: int
    devices: int
    memory_format: str


class Ours:
    """`atebm_jax.autoattack.run`, standard version."""

    def __init__(self, task: Task):
        import jax

        jax.config.update("jax_num_cpu_devices", task.devices)
        from atebm_jax import convert
        from atebm_jax.models import wide_resnet

        variables = jax.tree.map(
            jax.numpy.asarray, convert.from_torch("wide_resnet", task.weights)
        )
        arguments = {k: v for k, v in task.network.items() if k != "channels"}
        network = wide_resnet.network(**arguments)
        self.logits_fn = jax.tree_util.Partial(network.apply, variables)
        self.task = task

    def version(self) -> str:
        """Name and version of the library."""
        import jax

        return f"jax {jax.__version__}"

    def run(self, seed: int) -> dict[str, Any]:
        """One whole ensemble; compilation apart, in seconds of either clock."""
        import jax

        # Every repeat compiles anew, as the first one of a user does.
        jax.clear_caches()
        parts = dict.fromkeys(ATTACKS, 0.0)
        results: list[Any] = []
        with _compilation() as spent:
            last = [0.0, 0.0]

            def note(progress: Any) -> None:
                now = time.process_time() - spent["cpu"]
                if progress.attack in parts:
                    parts[progress.attack] += now - last[0]
                last[0] = now

            last[0] = time.process_time()
            wall, cpu = timed(lambda: results.append(self._run(seed, note)))
        return {
            "wall": wall - spent["wall"],
            "cpu": cpu - spent["cpu"],
            "compile_wall": spent["wall"],
            "compile_cpu": spent["cpu"],
            "parts": parts,
            "robust": {
                name: int(mask.sum()) for name, mask in results[0].robust.items()
            },
        }

    def count(self) -> dict[str, dict[str, int]]:
        """Images through the network, copies that fill batches included."""
        import jax

        passes: dict[str, Counter] = {name: Counter() for name in ATTACKS}
        since: Counter = Counter()

        def tick(kind: str, images: int) -> None:
            since[kind] += images

        @jax.custom_vjp
        def watched(x: jax.Array) -> jax.Array:
            jax.debug.callback(partial(tick, "forward", len(x)))
            return x

        def backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
            jax.debug.callback(partial(tick, "backward", len(gradient)))
            return (gradient,)

        watched.defvjp(lambda x: (watched(x), None), backward)

        def note(progress: Any) -> None:
            jax.effects_barrier()
            passes.get(progress.attack, Counter()).update(since)
            since.clear()

        self._run(0, note, lambda x: self.logits_fn(watched(x)))
        return {name: dict(found) for name, found in passes.items()}

    def _run(self, seed: int, on_progress: Any, logits_fn: Any = None) -> Any:
        import jax

        from atebm_jax import autoattack, sharding

        task = self.task
        split = sharding.batched(sharding.make_mesh()) if task.devices > 1 else None
        return autoattack.run(
            jax.random.key(seed),
            logits_fn or self.logits_fn,
            task.images,
            task.labels,
            threat=(task.norm, task.epsilon),
            settings={"num_steps": task.steps, "num_queries": task.queries},
            batch_size=task.batch_size,
            sharding=split,
            on_progress=on_progress,
        )


@contextlib.contextmanager
def _compilation() -> Iterator[dict[str, float]]:
    """Adds up what compiling costs inside, by clock: "wall" and "cpu"."""
    from atebm_jax.autoattack import programs

    spent = {"wall": 0.0, "cpu": 0.0}

    def ahead(function: Any) -> Any:
        """Compiles before the first call with a program and a shape."""
        ready: dict[Any, Any] = {}

        def call(program: Any, network: Any, batch: Any) -> Any:
            shape = (program, batch.images.shape)

            def make() -> None:
                ready[shape] = function.lower(program, network, batch).compile()

            if shape not in ready:
                wall, cpu = timed(make)
                spent["wall"] += wall
                spent["cpu"] += cpu
            return ready[shape](network, batch)

        return call

    functions = {name: ahead(getattr(programs, name)) for name in ("attack", "probe")}
    with mock.patch.multiple(programs, **functions):
        yield spent


class Torch:
    """torchattacks' AutoAttack, standard version, on our PyTorch network."""

    def __init__(self, task: Task):
        import torch
        from torch_reference import WideResNet

        torch.set_num_threads(task.threads)
        model = WideResNet(**task.network)
        state = {k: torch.from_numpy(np.array(v)) for k, v in task.weights.items()}
        model.load_state_dict(state, strict=False)
        model.eval().requires_grad_(False)
        self.passes: dict[str, Counter] = {name: Counter() for name in ATTACKS}
        # The attack that runs now; passes between attacks are nobody's.
        self.running: list[str] = []
        self.model = self._in_format(model, getattr(torch, task.memory_format))
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
        import torchattacks

        task = self.task
        attack = torchattacks.AutoAttack(
            self.model,
            norm={"linf": "Linf", "l2": "L2"}[task.norm],
            eps=task.epsilon,
            version="standard",
            n_classes=task.network["num_classes"],
            seed=seed,
        )
        parts = dict.fromkeys(ATTACKS, 0.0)
        robust = dict.fromkeys(ATTACKS, 0)
        for passes in self.passes.values():
            passes.clear()
        for name, member in zip(ATTACKS, attack._autoattack.attacks, strict=True):
            if hasattr(member, "steps"):
                # It ships with 10, the original has 100.
                member.steps = task.steps
            else:
                member.n_queries = task.queries
            member.forward = partial(self._part, name, member.forward, parts, robust)

        def work() -> None:
            for start in range(0, len(self.images), task.batch_size):
                part = slice(start, start + task.batch_size)
                attack(self.images[part], self.labels[part])

        wall, cpu = timed(work)
        return {
            "wall": wall,
            "cpu": cpu,
            "compile_wall": 0.0,
            "compile_cpu": 0.0,
            "parts": parts,
            "robust": robust,
        }

    def count(self) -> dict[str, dict[str, int]]:
        """Images through the network in the last run."""
        return {name: dict(found) for name, found in self.passes.items()}

    def _part(
        self,
        name: str,
        forward: Any,
        parts: dict[str, float],
        robust: dict[str, int],
        images: Any,
        labels: Any,
    ) -> Any:
        import torch

        self.running.append(name)
        results: list[Any] = []
        parts[name] += timed(lambda: results.append(forward(images, labels)))[1]
        self.running.pop()
        # As the ensemble itself counts it next.
        with torch.no_grad():
            predicted = self.model(results[0]).argmax(dim=1)
        robust[name] += int((predicted == labels).sum())
        return results[0]

    def _in_format(self, model: Any, memory_format: Any) -> Any:
        """The network in a memory format; images and their gradients stay contiguous.

        torchattacks takes views that need contiguous gradients.
        """
        import torch

        side = self

        class Formatted(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model.to(memory_format=memory_format)

            def forward(self, images: Any) -> Any:
                side._tick("forward", len(images))
                if images.requires_grad:
                    images.register_hook(self._backward)
                return self.model(images.contiguous(memory_format=memory_format))

            def _backward(self, gradient: Any) -> Any:
                side._tick("backward", len(gradient))
                return gradient.contiguous()

        return Formatted().eval()

    def _tick(self, kind: str, images: int) -> None:
        if self.running:
            self.passes[self.running[-1]][kind] += images
