"""What the project asks of a family of networks: each family's file answers.

Training asks for a network, the import for its names in PyTorch. A family is one file
of this folder, which ends with its `FAMILY`, and one line of `models.FAMILIES`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from atebm_jax.models.layers import Normalize

#: Input normalisations that weights are published for.
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CIFAR10 = {
    "mean": (0.4913997551666284, 0.48215855929893703, 0.4465309133731618),
    "std": (0.24703225141799082, 0.24348516474564, 0.26158783926049628),
}
AS_THEY_ARE: dict[str, tuple[float, ...]] = {"mean": (), "std": ()}

#: Values of `config.model` by field.
ModelFields = Mapping[str, Any]
#: Shapes of a state dict's arrays, PyTorch's layouts, by name.
Shapes = Mapping[str, tuple[int, ...]]
#: Templates of names, theirs and ours; {word} is a number, the same on both sides.
Rules = tuple[tuple[str, str], ...]


class Network(nn.Module, kw_only=True):
    """What the networks of all families have: the module of each is one.

    Called with images [B, H, W, C] float in [0, 1], it gives logits [B, K] float32, or
    with `features=True` what its last layer sees, [B, D]. With `train=True` it
    normalises with the batch's statistics, where it has any, and updates the running
    ones: the collection "batch_stats" must be mutable.

    Attributes:
      mean, std: input normalisation, one number a channel; empty for none.
      dtype: compute dtype of convolutions, dense layers and attention.
      conv_gradient: see `layers.chosen_form`.
      remat: compute a block's activations again in the backward pass.
    """

    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    dtype: Any = jnp.float32
    conv_gradient: str = "auto"
    remat: bool = False

    def normalised(self, images: jax.Array) -> jax.Array:
        """The images that the first layer sees."""
        return Normalize(self.mean, self.std)(images) if self.mean else images


def network_fields(model: ModelFields) -> dict[str, Any]:
    """The fields of a `Network` and its number of classes from `config.model`."""
    return {
        "num_classes": model["num_classes"],
        "mean": tuple(model["mean"]),
        "std": tuple(model["std"]),
        "dtype": jnp.dtype(model["dtype"]),
        "conv_gradient": model["conv_gradient"],
        "remat": model["remat"],
    }


@dataclass(frozen=True)
class TorchNames:
    """A family's names in PyTorch, and what they say about a network.

    One source's names are the family's own, in which weights are written; those of
    other sources are read as `aliases` of them. All other attributes use its own names.

    Attributes:
      rules: names of modules, PyTorch's and ours. The last part of an array's name
        (weight, bias, ...) is no part of them. The last layer is our "fc".
      mark: an array that every network of the family has, by which it is known.
      first: names of the convolution that sees the images; the first that is there.
      fields: what shapes say about `config.model`, except for its classes; what they
        leave open is left out.
      side: usual side of a network's images, in pixels.
      usual: the input normalisation that all public weights of a network expect, or
        None where they differ.
      who: whose weights expect which, with the flags to give, where they differ.
      aliases: whole names of other sources, and the names that they are read as;
        {leaf} is "weight" or "bias".
      bare: parameters that are no layer's weight or bias and keep their layout, by the
        last part of their name, and their number of axes: PyTorch may have more of
        length one behind.
      unused: the arrays that networks carry and no forward pass uses, and what they
        are.
      look_alikes: other networks that have this family's names too, or are brought in
        its place: what each is, and a pattern of a name that only it has, or a test of
        the shapes.
    """

    rules: Rules
    mark: str
    first: tuple[str, ...]
    fields: Callable[[Shapes], dict[str, Any]]
    side: Callable[[ModelFields], int]
    usual: Callable[[ModelFields], Mapping[str, tuple[float, ...]] | None]
    who: str = ""
    aliases: Rules = ()
    bare: Mapping[str, int] = field(default_factory=dict)
    unused: Callable[[Shapes], tuple[set[str], str]] = lambda shapes: (set(), "")
    look_alikes: Mapping[str, str | Callable[[Shapes], bool]] = field(
        default_factory=dict
    )


@dataclass(frozen=True)
class Family:
    """Networks that one Flax module computes.

    Attributes:
      build: `config.model` to the network; refuses what cannot be built.
      sized_by: fields of `config.model` that give a network its size.
      archs: usual names of networks, and what each sets in `config.model`. Classes and
        normalisation are those of the data that public weights were trained on.
      activation: the only one of its networks; None where `config.model.activation`
        says which.
      torch: names in PyTorch; None where there are none: no weights in or out.
    """

    build: Callable[[Any], nn.Module]
    sized_by: tuple[str, ...]
    archs: Mapping[str, ModelFields] = field(default_factory=dict)
    activation: str | None = None
    torch: TorchNames | None = None


def count(shapes: Shapes, template: str) -> int:
    """How many numbers in place of the template's "{}" make an array's name."""
    before, after = template.split("{}")
    numbers = (
        name[len(before) : -len(after)]
        for name in shapes
        if name.startswith(before) and name.endswith(after)
    )
    return len({number for number in numbers if number.isdecimal()})


def outputs(shapes: Shapes, name: str) -> int:
    """Outputs of a layer by its weight; 0 for a single number, which fits nothing."""
    return (*shapes[name], 0)[0]
