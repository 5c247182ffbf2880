"""What a family of networks is: how one is built, and its names in PyTorch.

A family is one file of this folder, which ends with its `FAMILY`, and one line of
`models.FAMILIES`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from atebm_jax.models.layers import normalize, standardize

#: Input normalisations that weights are published for.
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CIFAR10 = {
    "mean": (0.4913997551666284, 0.48215855929893703, 0.4465309133731618),
    "std": (0.24703225141799082, 0.24348516474564, 0.26158783926049628),
}
#: Of DeepMind's networks, by the number of classes: CIFAR-10's and CIFAR-100's.
DEEPMIND: dict[int, dict[str, tuple[float, ...]]] = {
    10: {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)},
    100: {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)},
}
AS_THEY_ARE: dict[str, tuple[float, ...]] = {"mean": (), "std": ()}

#: Values of `config.model` by field.
ModelFields = Mapping[str, Any]
#: Shapes of a state dict's arrays by name, in PyTorch's layouts.
Shapes = Mapping[str, tuple[int, ...]]
#: Pairs of templates of names, theirs and ours. {word} is the same number in both.
Rules = tuple[tuple[str, str], ...]


class Network(nn.Module, kw_only=True):
    """The base of all networks.

    It maps images [B, H, W, C] float in [0, 1] to logits [B, K] float32, or with
    `features=True` to the input of its last layer, [B, D]. With `train=True`, batch
    normalisation uses the batch's statistics and updates the running ones: the
    collection "batch_stats" must be mutable.

    Attributes:
      num_classes: K.
      mean, std: input normalisation, one number a channel; empty for none.
      standardize: normalises each image by its own mean and deviation instead.
      dtype: compute dtype of convolutions, dense layers and attention.
      remat: computes a block's activations again in the backward pass.
    """

    num_classes: int
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    standardize: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    def normalised(self, images: jax.Array) -> jax.Array:
        """The images that the first layer sees."""
        if self.standardize:
            return standardize(images)
        return normalize(images, self.mean, self.std) if self.mean else images


def network_fields(model: ModelFields, *own: str) -> dict[str, Any]:
    """The fields of every `Network` from `config.model`, and a network's own fields."""
    return {
        "num_classes": model["num_classes"],
        "mean": tuple(model["mean"]),
        "std": tuple(model["std"]),
        "standardize": model["standardize"],
        "dtype": jnp.dtype(model["dtype"]),
        "remat": model["remat"],
        **{name: model[name] for name in own},
    }


def batch_counters(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """How many batches PyTorch's batch normalisation has seen, which loaders ask for.

    Args:
      arrays: a network's weights and statistics by PyTorch name.
    """
    layers = (
        n.removesuffix("running_mean") for n in arrays if n.endswith("running_mean")
    )
    return {
        f"{layer}num_batches_tracked": np.zeros((), np.int64)
        for layer in layers
        if f"{layer}weight" in arrays
    }


@dataclass(frozen=True)
class TorchNames:
    """A family's names in PyTorch, and what the arrays say about a network.

    The names of one source are the family's own: weights are exported under them, and
    all attributes but `aliases` use them.

    Attributes:
      rules: names of modules, PyTorch's and ours, without the last part of an array's
        name (weight, bias, ...). Our name of the last layer is "fc".
      mark: an array that identifies the family: each of its networks has it.
      first: possible names of the convolution that sees the images.
      fields: shapes to the fields of `config.model` that they determine, without the
        number of classes.
      side: usual side of a network's images, in pixels.
      usual: the input normalisation that all public weights of a network expect; None
        where they differ.
      who: where they differ, the flags to give for whose weights.
      activation: assumed where the family has several and no file says which.
      unsaid: `fields` to those of them that names and shapes leave open, so that they
        are what is usual, and to how a user gives others. An export writes them beside
        the weights.
      aliases: whole names in other sources, and our source's names for them; {leaf} is
        "weight" or "bias".
      settle: a whole file's arrays to those of a file whose names translate one by one:
        for sources that number or divide layers otherwise.
      bare: parameters that are no layer's weight or bias and keep their layout: the
        last part of their name, and their number of axes. PyTorch's may have further
        axes of length one at the end.
      unused: the arrays that no forward pass uses, and a phrase that explains them.
      beside: a network's arrays by PyTorch name to those that its class in PyTorch
        keeps beside them, so that an export loads with `strict=True`.
      look_alikes: other networks with this family's names, or that users take for it: a
        description, and a pattern of a name that only they have, or a test of the
        shapes.
      published: whose public weights have these names, for the list of families.
    """

    rules: Rules
    mark: str
    first: tuple[str, ...]
    fields: Callable[[Shapes], dict[str, Any]]
    side: Callable[[ModelFields], int]
    usual: Callable[[ModelFields], Mapping[str, tuple[float, ...]] | None]
    who: str = ""
    activation: str = "relu"
    unsaid: Callable[[ModelFields], Mapping[str, str]] = lambda fields: {}
    aliases: Rules = ()
    settle: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = dict
    bare: Mapping[str, int] = field(default_factory=dict)
    unused: Callable[[Shapes], tuple[set[str], str]] = lambda shapes: (set(), "")
    beside: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = batch_counters
    look_alikes: Mapping[str, str | Callable[[Shapes], bool]] = field(
        default_factory=dict
    )
    published: str = ""


#: Share of what differentiation keeps that compilers keep: no less than in any row of
#: docs/cost.md that needs a GiB or more on eight v5e or H100.
MOST_KEPT = 0.76


@dataclass(frozen=True)
class Family:
    """Networks that one Flax module computes.

    Attributes:
      build: makes the network of a `config.model`; raises `UserError` if it cannot.
      fields: the fields of `config.model` that `build` reads beside those of all
        networks, with their defaults. Families that share a field share its default.
      sized_by: fields of `config.model` that give a network its size.
      archs: usual names of networks, and what each sets in `config.model`. Classes and
        normalisation are those of the data that public weights were trained on.
      activation: the activation of all its networks; None if
        `config.model.activation` chooses it.
      torch: names in PyTorch; None if weights cannot be imported or exported.
      compiled_share: as `MOST_KEPT`, of its own rows alone.
    """

    build: Callable[[Any], nn.Module]
    sized_by: tuple[str, ...]
    fields: ModelFields = field(default_factory=dict)
    archs: Mapping[str, ModelFields] = field(default_factory=dict)
    activation: str | None = None
    torch: TorchNames | None = None
    compiled_share: float = MOST_KEPT


def block_rules(
    theirs: str, ours: str, layers: Mapping[str, str], groups: int
) -> Rules:
    """Rules for the layers of the blocks of several groups.

    Args:
      theirs, ours: PyTorch's name of a block and ours, with {g0} for the number of its
        group from 0, or {g} from 1.
      layers: PyTorch's names of a block's layers, and ours.
      groups: number of groups.
    """

    def named(block: str, group: int, layer: str) -> str:
        return block.replace("{g0}", f"{group}").replace("{g}", f"{group + 1}") + layer

    return tuple(
        (named(theirs, group, f".{layer}"), named(ours, group, f"/{own}"))
        for group in range(groups)
        for layer, own in layers.items()
    )


def count(shapes: Shapes, template: str) -> int:
    """Number of arrays whose name is the template with a number in place of "{}"."""
    before, after = template.split("{}")
    numbers = (
        name[len(before) : -len(after)]
        for name in shapes
        if name.startswith(before) and name.endswith(after)
    )
    return len({number for number in numbers if number.isdecimal()})


def outputs(shapes: Shapes, name: str) -> int:
    """Outputs of the layer with this weight; 0 if the array is a single number."""
    return (*shapes[name], 0)[0]
