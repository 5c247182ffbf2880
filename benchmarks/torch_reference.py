"""The inner loop and the stage-2 step in plain PyTorch, to measure ours against.

Written from the same description as `atebm_jax`, as one would write it in PyTorch: the
network in evaluation mode (frozen batch normalisation), image gradients by
`torch.autograd.grad` with the parameters' gradients switched off during the loops, one
backward pass for the sum of the losses, and the optimisers as PyTorch has them.
Images are NCHW here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Objective = Callable[[Tensor], Tensor]

ACTIVATIONS = {"relu": functional.relu, "swish": functional.silu}


class Block(nn.Module):
    """Pre-activation block; the shortcut of a change of width sees the activation."""

    def __init__(self, inputs: int, features: int, stride: int, activation: Objective):
        super().__init__()
        self.activation = activation
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, features, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.convShortcut = (
            None
            if inputs == features
            else nn.Conv2d(inputs, features, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        active = self.activation(self.bn1(x))
        y = self.conv2(self.activation(self.bn2(self.conv1(active))))
        return y + (x if self.convShortcut is None else self.convShortcut(active))


class Group(nn.Module):
    """Blocks of one width; the first one may halve the image."""

    def __init__(
        self, count: int, inputs: int, features: int, stride: int, activation: Objective
    ):
        super().__init__()
        self.layer = nn.Sequential(
            *(
                Block(
                    inputs if index == 0 else features,
                    features,
                    stride if index == 0 else 1,
                    activation,
                )
                for index in range(count)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """Images [B, C, H, W] in [0, 1] to logits [B, K]; normalisation inside."""

    def __init__(
        self,
        *,
        depth: int,
        widen_factor: int,
        num_classes: int,
        channels: int,
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
        activation: str = "relu",
    ):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.normalize = bool(mean)
        # Buffers outside the state dict: they are constants of the data set.
        shape = (1, -1, 1, 1)
        self.register_buffer("mean", torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(shape), persistent=False)
        count, width = (depth - 4) // 6, 16 * widen_factor
        widths = (16, width, 2 * width, 4 * width)
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = Group(count, widths[0], widths[1], 1, self.activation)
        self.block2 = Group(count, widths[1], widths[2], 2, self.activation)
        self.block3 = Group(count, widths[2], widths[3], 2, self.activation)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        if self.normalize:
            x = (x - self.mean) / self.std
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.activation(self.bn1(x)).mean(dim=(2, 3)))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, only images need gradients: backward passes skip the parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)[:, None, None, None]


def pgd(
    objective: Objective,
    images: Tensor,
    *,
    epsilon: float,
    step_size: float,
    num_steps: int,
) -> Tensor:
    """L2 ascent on the sum of a per-image objective, eps may be infinite."""
    x = images.detach()
    for _ in range(num_steps):
        x.requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(x).sum(), x)
        with torch.no_grad():
            x = x + step_size * gradient / (_norm(gradient) + 1e-10)
            if epsilon != float("inf"):
                delta = x - images
                norm = _norm(delta)
                x = images + delta * torch.where(
                    norm > epsilon, epsilon / (norm + 1e-7), 1.0
                )
            x = x.clamp(0.0, 1.0)
    return x.detach()


def _pick(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.float().gather(1, labels[:, None])[:, 0]


def auroc(positive: Tensor, negative: Tensor) -> Tensor:
    """P(positive > negative) + P(equal) / 2, by sorting."""
    ranked = negative.sort().values
    below = torch.searchsorted(ranked, positive)
    not_above = torch.searchsorted(ranked, positive, right=True)
    return 0.5 * (below + not_above).float().mean() / len(negative)


def _optimizer(model: nn.Module, config: Any) -> torch.optim.Optimizer:
    common = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        # Fused or not as PyTorch has it by default.
        return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), **common)
    return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **common)


class Stage2:
    """Everything one stage-2 step needs and changes.

    Attributes:
      model: the network that trains, always in evaluation mode.
      forward: images to logits, the model itself or a compiled form of it.
      average: its exponential average.
      num_steps: T, raised by the curriculum.
    """

    def __init__(self, model: nn.Module, config: Any, average: nn.Module):
        self.model = model.eval()
        self.forward: Objective = self.model
        self.average = average.eval().requires_grad_(False)
        self.config = config
        self.num_averages = 0
        self.num_steps = config.t_max
        self.window: list[Tensor] = []
        self.optimizer = _optimizer(model, config)

    def step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One update on uint8 images and int64 labels; returns scalar metrics."""
        inputs = {
            name: value.float() / 255.0 if value.dtype == torch.uint8 else value
            for name, value in batch.items()
        }
        made = self._adversaries(inputs)
        loss, metrics = self._loss(inputs, made)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [p.grad for p in self.model.parameters()]
        norm = torch.nn.utils.get_total_norm(gradients)
        # As ours: a step that is not finite is not applied.
        if torch.isfinite(loss) & torch.isfinite(norm):
            self.optimizer.step()
            self._move_average()
            self._grow(metrics["auc"])
        return {"loss": loss.detach(), "gradient_norm": norm, **metrics}

    def contrastive(self, seeds: Tensor, labels: Tensor) -> Tensor:
        """Contrastive images: T steps up f(x)[y] from the seeds, without a ball."""
        with frozen(self.model):
            return pgd(
                lambda x: _pick(self.forward(x), labels),
                seeds,
                epsilon=float("inf"),
                step_size=self.config.contrastive_step_size,
                num_steps=self.num_steps,
            )

    def _adversaries(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        config, attack = self.config, self.config.adversary
        seeds, labels = inputs["x_ood"], inputs["y_cls"]
        x_contrastive = self.contrastive(seeds, inputs["y_gen"])
        with frozen(self.model):
            x_adv = pgd(
                lambda x: functional.cross_entropy(
                    self.forward(x).float(), labels, reduction="none"
                ),
                inputs["x_cls"],
                epsilon=attack.epsilon,
                step_size=attack.step_size,
                num_steps=attack.num_steps,
            )
        with torch.no_grad():
            seed_logits = self.forward(seeds).float()
        travel = _norm(x_contrastive - seeds).mean() / (
            config.contrastive_step_size * max(self.num_steps, 1)
        )
        return {
            "x_contrastive": x_contrastive,
            "x_adv": x_adv,
            "seed_logits": seed_logits,
            "travel": travel,
        }

    def _loss(
        self, inputs: dict[str, Tensor], made: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images = torch.cat([inputs["x_gen"], made["x_contrastive"], made["x_adv"]])
        real, fake, adversarial = self.forward(images).float().chunk(3)
        loss_ce = functional.cross_entropy(adversarial, inputs["y_cls"])
        scores = torch.cat([real, fake]).logsumexp(dim=1)
        targets = torch.zeros_like(scores)
        targets[: len(real)] = 1.0
        loss_bce = functional.binary_cross_entropy_with_logits(scores, targets)
        loss = self.config.weight_ce * loss_ce + self.config.weight_bce * loss_bce
        with torch.no_grad():
            labels, seeds = inputs["y_gen"], made["seed_logits"]
            positive = _pick(real, labels)
            correct = adversarial.argmax(dim=1) == inputs["y_cls"]
            metrics = {
                "loss_ce": loss_ce.detach(),
                "loss_bce": loss_bce.detach(),
                "accuracy_adv": correct.float().mean(),
                "travel": made["travel"],
                "auc": auroc(positive, _pick(fake, labels)),
                "auc_seeds": auroc(positive, _pick(seeds, labels)),
                "score_real": scores[: len(real)].mean(),
                "score_contrastive": scores[len(real) :].mean(),
                "score_seeds": seeds.logsumexp(dim=1).mean(),
            }
        return loss, metrics

    @torch.no_grad()
    def _move_average(self) -> None:
        n = self.num_averages
        decay = min(self.config.average_decay, (1 + n) / (10 + n)) if n else 0.0
        averages = list(self.average.parameters())
        torch._foreach_lerp_(averages, list(self.model.parameters()), 1.0 - decay)
        self.num_averages += 1

    def _grow(self, auc: Tensor) -> None:
        """The curriculum: T grows when a full window's mean AUC is high enough."""
        config = self.config
        length = -(-config.auc_window_images // config.batch_size)
        self.window = [*self.window, auc][-length:]
        if len(self.window) < length or self.num_steps >= config.t_max:
            return
        if torch.stack(self.window).mean() >= config.auc_threshold:
            self.num_steps += 1
            self.window = []
