"""Networks, batches and comparisons that several tests share."""

import json
import zlib
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from atebm_jax import config, convert, hlo, optim, stages, targets, train_step
from atebm_jax.models import (
    convnext,
    forms,
    layers,
    preact_resnet,
    resnet,
    swin,
    vit,
    wide_resnet,
)

MEAN = (0.4913997551666284, 0.48215855929893703, 0.4465309133731618)
STD = (0.24703225141799082, 0.24348516474564, 0.26158783926049628)

STREAMS = ("gen", "cls", "ood")

# Positions over which each batch normalisation of the network averages, per image.
_POSITIONS = {
    "block1_0/bn1": 32 * 32,
    "block1_0/bn2": 32 * 32,
    "block2_0/bn1": 32 * 32,
    "block2_0/bn2": 16 * 16,
    "block3_0/bn1": 16 * 16,
    "block3_0/bn2": 8 * 8,
    "bn1": 8 * 8,
}


def network(**options: Any) -> wide_resnet.PreActivated:
    """WRN-10-1 with CIFAR's normalisation inside."""
    defaults = {"depth": 10, "widen_factor": 1, "num_classes": 10}
    return wide_resnet.network(**defaults | {"mean": MEAN, "std": STD} | options)


def conv_xla(
    images: jax.Array, kernel: jax.Array, strides: Any, padding: Any, groups: int = 1
) -> jax.Array:
    """`models.layers.conv` in XLA's form."""
    with forms.only("xla"):
        return layers.conv(images, kernel, strides, padding, groups)


def double_network() -> wide_resnet.PreActivated:
    """`network` in float64, where the reference rounded mean and std to float32.

    Normalisation follows its input: float32 at least.
    """
    mean, std = ([float(np.float32(x)) for x in values] for values in (MEAN, STD))
    return network(dtype=jnp.float64, mean=mean, std=std)


def target(name: str) -> targets.Target:
    """A machine to compile for; skips where its compiler is not installed."""
    found = targets.parse(name)
    if install := targets.missing(found):
        pytest.skip(f"the compiler of {name} is not installed: {install}")
    return found


def compiled(lowered: Any) -> Any:
    """Compiles as users do: tests have most of the optimisations turned off."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, False)
    try:
        return lowered.compile()
    finally:
        jax.config.update(name, before)


def logits_and_gradient(
    network: nn.Module, weights: Any, images: np.ndarray, label: int
) -> tuple[jax.Array, jax.Array]:
    """Logits, and the image gradient of those with one label."""

    def score(x: jax.Array, weights: Any) -> tuple[jax.Array, jax.Array]:
        logits = network.apply(weights, x)
        return logits[:, label].sum(), logits

    # The compiler would fold constant weights, for longer than all else takes.
    gradient, logits = jax.jit(jax.grad(score, has_aux=True))(images, weights)
    return logits, gradient


def assert_relative(actual: Any, expected: np.ndarray, tolerance: float) -> None:
    """Refuses differences above a share of the largest value that is expected."""
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )


def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the smallest networks of fixed sizes shallow, so that they compile fast.

    Every kind of layer is still there.
    """
    channels = convnext.SIZES["tiny"][1]
    for family in (resnet, preact_resnet):
        monkeypatch.setitem(family.STAGES, 18, (1, 1, 1, 1))
    monkeypatch.setitem(convnext.SIZES, "tiny", ((1, 1, 1, 1), channels))
    monkeypatch.setattr(vit, "DEPTH", 2)
    monkeypatch.setitem(swin.SIZES, "tiny", ((2, 1, 1, 1), *swin.SIZES["tiny"][1:]))


def double(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same arrays, floats as float64."""
    return {
        name: x.astype(np.float64) if x.dtype == np.float32 else x
        for name, x in arrays.items()
    }


def variables(state_dict: dict[str, np.ndarray], prefix: str = "") -> dict[str, Any]:
    """Flax variables of the arrays under a prefix, on the device."""
    arrays = {
        name.removeprefix(prefix): value
        for name, value in state_dict.items()
        if name.startswith(prefix)
    }
    return jax.tree.map(jnp.asarray, convert.from_torch("wide_resnet", arrays))


def rule_weights(
    stored: dict[str, np.ndarray], gain: float = 1.0
) -> dict[str, np.ndarray]:
    """A full-size network's weights, which follow from their names alone.

    The rule is the golden files'; its sums are checked before anything rests on it.
    """
    made = {}
    for name, text, check in zip(
        map(str, stored["param_names"]),
        map(str, stored["param_shapes"]),
        stored["param_check_sum_first_last"],
        strict=True,
    ):
        made[name] = _rule_weight(name, tuple(json.loads(text)), gain)
        flat = made[name].ravel()
        sums = [flat.sum(dtype=np.float64), flat[0], flat[-1]]
        np.testing.assert_allclose(sums, check, rtol=1e-9, atol=1e-9)
    return made


def _rule_weight(name: str, shape: tuple[int, ...], gain: float) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    noise = generator.standard_normal(shape).astype(np.float32)
    last = name.rpartition(".")[2]
    if last == "weight" and len(shape) > 1:
        return np.float32(np.sqrt(gain / np.prod(shape[1:]))) * noise
    if last == "running_var":
        return np.float32(1) + np.float32(0.1) * np.abs(noise)
    if last == "gamma":
        return np.float32(0.1) + np.float32(0.01) * noise
    if last == "weight":
        return np.float32(1) + np.float32(0.1) * noise
    return np.float32(0.1) * noise


def unbiased(new: Any, old: Any, batch_size: int) -> Any:
    """Running statistics as if variances had been averaged in with n / (n - 1).

    The reference does that; ours averages the biased variance of the batch.
    """
    news, olds = (flax.traverse_util.flatten_dict(x, sep="/") for x in (new, old))
    result = dict(news)
    for layer, positions in _POSITIONS.items():
        n = batch_size * positions
        name = f"{layer}/var"
        kept = 0.9 * olds[name]
        result[name] = kept + (news[name] - kept) * (n / (n - 1))
    return flax.traverse_util.unflatten_dict(result, sep="/")


def assert_close(actual: Any, expected: Any, atol: float) -> None:
    """Every leaf within an absolute tolerance; names the leaf that is not."""

    def compare(path: Any, a: jax.Array, b: jax.Array) -> None:
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)

    jax.tree_util.tree_map_with_path(compare, actual, expected)


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Every leaf equal, NaN included."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def max_difference(actual: Any, expected: Any) -> float:
    """Largest absolute difference over all leaves."""
    differences = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), actual, expected
    )
    return float(max(jax.tree.leaves(differences)))


class TwoLayers(nn.Module):
    """Two convolutions with batch normalisation: what compiles fast."""

    num_classes: int = 4
    channels: int = 8
    activation: str = "relu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        activation, dtype = layers.ACTIVATIONS[self.activation], self.dtype
        for index, stride in enumerate((1, 2)):
            x = layers.Conv(
                self.channels, 3, stride, 1, dtype=dtype, name=f"conv{index}"
            )(x)
            x = activation(layers.batch_norm(f"bn{index}", train)(x))
        return nn.Dense(self.num_classes, name="fc")(x.mean(axis=(1, 2)))


def random_variables(network: nn.Module, shape: tuple[int, ...], seed: int = 0) -> Any:
    """Variables of a network from NumPy's noise, so that nothing is compiled."""
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)
    rng = np.random.default_rng(seed)

    def draw(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        positive = path[-1].key in ("scale", "var")
        fan_in = np.prod(x.shape[:-1]) if len(x.shape) > 1 else 25.0
        noise = rng.normal(scale=fan_in**-0.5, size=x.shape)
        return jnp.asarray(1 + np.abs(noise) if positive else noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_batch(
    size: int, shape: tuple[int, ...], num_classes: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Noise for the three streams, with labels."""
    rng = np.random.default_rng(seed)
    images = {f"x_{s}": rng.random((size, *shape), np.float32) for s in STREAMS}
    labels = {
        f"y_{s}": rng.integers(0, num_classes, size, np.int32) for s in STREAMS[:2]
    }
    return images | labels


def stage_config(name: str, **overrides: Any) -> ConfigDict:
    """`config.stage1` or `config.stage2` of the paper's CIFAR rows."""
    block = config.default()[name]
    block.update_from_flattened_dict(overrides)
    return block


def taught(stage: stages.Stage) -> stages.Stage:
    """The stage with images made by PGD replaced by those the batch brings along.

    A batch has `taught_<image>` for every image to replace, and `teach`, whether to.
    """

    def adversaries(
        key: Any, weights: Any, extra: Any, batch: stages.Batch
    ) -> dict[str, jax.Array]:
        made = stage.adversaries(key, weights, extra, batch)
        for name in made:
            if f"taught_{name}" in batch:
                made[name] = jnp.where(
                    batch["teach"], batch[f"taught_{name}"], made[name]
                )
        return made

    return stage._replace(adversaries=adversaries)


def jitted_step(
    stage: stages.Stage, optimizer: str, rate: float, decay: float
) -> tuple[Any, Any]:
    """The compiled update at a constant learning rate, and its optimiser."""
    transformation = optim.optimizer(optimizer, weight_decay=decay)
    step = train_step.make(
        stage, transformation, optim.schedule("constant", peak=rate, num_steps=100)
    )
    return jax.jit(step), transformation


class Program(hlo.Program):
    """The text of a compiled program, and what only tests ask of it."""

    def __init__(self, text: str):
        super().__init__(text)
        # Inputs whose memory an output takes over.
        self.num_aliases = text.partition("\n")[0].count("-alias)")
        # Communication during which a GPU computes nothing.
        lines = [line for line in text.splitlines() if '"is_sync":true' in line]
        self.waits = hlo.collectives(lines)

    def lines(self, name: str) -> list[str]:
        """The instructions of one computation, without those that it calls."""
        return [hlo._code(line) for line in self._lines[name]]

    def loop_bodies(self) -> list[list[str]]:
        """The instructions of every loop body with all that it calls."""
        loops = (loop for name in self._lines for loop in self.loops(name))
        return [self.reachable(loop.body) for loop in loops]

    def outside_loops(self) -> list[str]:
        """All instructions that are in no loop body."""
        inside = {line for body in self.loop_bodies() for line in body}
        return [line for line in self.everything() if line not in inside]


def convolutions(lines: list[str]) -> list[tuple[int, ...]]:
    """The result shapes of the convolutions among some instructions."""
    found = [line.partition(" convolution(") for line in lines]
    return [hlo._sizes(before)[-1] for before, here, _ in found if here]
