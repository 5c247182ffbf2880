"""What the sides of `step.py` share: settings, inputs and clocks.

A side offers `weights`, `prepare` (compile), `check` (results to compare) and `run`
(one timed repeat): `jax_side.JaxSide` and `torch_side.TorchSide`.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

MEASURED = ("loop", "step")
CHECKED_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a side computes; `config.stage2` has the batch size and T."""

    config: ConfigDict
    device: str = "cpu"
    threads: int = 1
    # Ours only: form of operations (`models.forms`; None: the device's), and devices
    # that a batch is split over.
    form: str | None = None
    cpu_devices: int = 1
    # PyTorch only.
    memory_format: str = "channels_last"
    compile: bool = False


def batch(config: ConfigDict) -> dict[str, np.ndarray]:
    """Noise for all three streams: uint8 images [B, H, W, C] and int32 labels [B]."""
    rng = np.random.default_rng(0)
    size = config.stage2.batch_size
    shape = (size, *config.data.image_shape)
    images = {
        f"x_{name}": rng.integers(0, 256, shape, np.uint8)
        for name in ("gen", "cls", "ood")
    }
    labels = {
        f"y_{name}": rng.integers(0, config.model.num_classes, size, np.int32)
        for name in ("gen", "cls")
    }
    return {**images, **labels}


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """(wall seconds, CPU seconds of all threads of this process)."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu
