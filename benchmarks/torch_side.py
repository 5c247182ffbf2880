"""The PyTorch side of `step.py`: `torch_reference` with our weights and batch."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch_imagenet
import torch_reference
from ml_collections import ConfigDict
from sides import CHECKED_STEPS, Settings, batch, timed
from torch import nn

from atebm_jax import convert
from atebm_jax.errors import UserError


def _wide_resnet(config: ConfigDict) -> Any:
    model = config.model
    return torch_reference.WideResNet(
        depth=model.depth,
        widen_factor=model.widen_factor,
        num_classes=model.num_classes,
        channels=config.data.image_shape[2],
        mean=tuple(model.mean),
        std=tuple(model.std),
        activation=model.activation,
    )


def _resnet(config: ConfigDict) -> Any:
    model = config.model
    if model.depth not in torch_imagenet.STAGES or model.activation != "relu":
        raise UserError(
            f"the PyTorch side has ResNets of depth 50 and 101 with ReLU: not "
            f"{model.depth} with {model.activation}; choose --compare=none."
        )
    return torch_imagenet.ResNet(
        depth=model.depth,
        base_width=model.base_width,
        num_classes=model.num_classes,
        channels=config.data.image_shape[2],
        mean=tuple(model.mean),
        std=tuple(model.std),
    )


def _convnext(config: ConfigDict) -> Any:
    model = config.model
    return torch_imagenet.ConvNeXt(
        size=model.size,
        stem=model.stem,
        num_classes=model.num_classes,
        channels=config.data.image_shape[2],
        mean=tuple(model.mean),
        std=tuple(model.std),
    )


# Networks with a PyTorch twin, by `config.model.name`: how it is built, and how its
# state dict becomes our variables.
TWINS: dict[str, tuple[Callable[[ConfigDict], Any], Callable[[Mapping], Any]]] = {
    "wide_resnet": (_wide_resnet, partial(convert.from_torch, "wide_resnet")),
    "resnet": (_resnet, partial(convert.from_torch, "resnet")),
    "convnext": (_convnext, partial(convert.from_torch, "convnext")),
}

# What the twin's step can do, by field of `config.stage2`: the paper's rows.
SUPPORTED = {
    "schedule": "constant",
    "warmup_steps": 0,
    "contrastive_objective": "conditional",
    "weight_r1": 0.0,
    "log_r1": False,
    "adversary.norm": "l2",
    "adversary.momentum": 0.0,
    "adversary.keep_best": False,
}


class TorchSide:
    """The PyTorch twin, `torch_reference`."""

    def __init__(self, settings: Settings):
        if settings.device == "gpu" and not torch.cuda.is_available():
            raise UserError(
                "--device=gpu, but PyTorch sees no GPU here: install a CUDA build of "
                "PyTorch, or choose --compare=none."
            )
        torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.config.seed)
        self.config = settings.config
        self.settings = settings
        self.device = torch.device("cuda" if settings.device == "gpu" else "cpu")
        build, self._to_flax = TWINS[self.config.model.name]
        average = build(self.config)
        self.model = build(self.config)
        _estimate_statistics(self.model, self.config)
        average.load_state_dict(self.model.state_dict())
        layout = {"memory_format": getattr(torch, settings.memory_format)}
        self.model = self.model.to(self.device, **layout)
        self.stage = torch_reference.Stage2(
            self.model, self.config.stage2, average.to(self.device, **layout)
        )

    def weights(self) -> Any:
        """The twin's weights as our variables."""
        state = self.model.state_dict()
        return self._to_flax({name: _array(value) for name, value in state.items()})

    def prepare(self, variables: Any) -> dict[str, Any]:
        """Runs loop and step once without keeping the result."""
        del variables
        if self.settings.compile:
            self.stage.forward = torch.compile(self.model)
        self.batch = {
            name: self._put(value) for name, value in batch(self.config).items()
        }
        self.seeds = self.batch["x_ood"].float() / 255.0
        versions = {"torch": torch.__version__}
        name = "cpu"
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name()
            versions["cuda"] = str(torch.version.cuda)
        first = timed(self._contrastive)[0] if self.settings.compile else 0.0
        return {
            "compile_s": {"loop": first, "step": 0.0},
            "device": name,
            "versions": versions,
        }

    def _put(self, array: np.ndarray) -> Any:
        if array.ndim == 1:
            return torch.from_numpy(array.astype(np.int64)).to(self.device)
        images = torch.from_numpy(array).permute(0, 3, 1, 2)
        layout = getattr(torch, self.settings.memory_format)
        return images.to(self.device).contiguous(memory_format=layout)

    def _autocast(self) -> Any:
        half = self.config.model.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def _contrastive(self) -> Any:
        with self._autocast():
            images = self.stage.contrastive(self.seeds, self.batch["y_gen"])
        self._wait()
        return images

    def _advance(self) -> dict[str, Any]:
        with self._autocast():
            metrics = self.stage.step(self.batch)
        self._wait()
        return metrics

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def check(self) -> dict[str, Any]:
        """As `JaxSide.check`, in its layouts and names."""
        with self._autocast(), torch.no_grad():
            logits = _array(self.model(self.seeds))
        images = _array(self._contrastive()).transpose(0, 2, 3, 1)
        metrics = [self._advance() for _ in range(CHECKED_STEPS)]
        average = self.stage.average.state_dict()
        return {
            "logits": logits,
            "images": images,
            "metrics": [
                {name: float(value) for name, value in step.items()} for step in metrics
            ],
            "params": self.weights()["params"],
            "average_params": self._to_flax(
                {name: _array(value) for name, value in average.items()}
            )["params"],
        }

    def run(self, what: str) -> tuple[float, float]:
        """As `JaxSide.run`."""
        return timed(self._contrastive if what == "loop" else self._advance)


def _estimate_statistics(model: Any, config: ConfigDict) -> None:
    """Running statistics of one batch of noise, so that activations keep their size."""
    height, width, channels = config.data.image_shape
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(16, channels, height, width))


def _array(tensor: Any) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy())
