"""Which network a state dict is of: each family is asked by its names and shapes."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from atebm_jax.convert.names import canonical, known, last_layer, spellings
from atebm_jax.models import FAMILIES
from atebm_jax.models.family import Shapes


def _families() -> Iterator[str]:
    return (name for name, family in FAMILIES.items() if family.torch is not None)


def recognise(shapes: Shapes) -> tuple[str | None, str | None]:
    """The family of a state dict, or what else the network is.

    Args:
      shapes: of every array, PyTorch layouts, by name.

    Returns:
      (a key of `models.FAMILIES` whose networks have such names, None); or (None, what
      the network is that is not built here). Both are None where nobody knows it.
    """
    for family in _families():
        if _has_mark(family, shapes) and not look_alike(family, shapes):
            return family, None
    others = (look_alike(family, shapes) for family in _families())
    return None, next((what for what in others if what), None)


def family_of(names: Iterable[str]) -> str | None:
    """The first family by whose mark names are known, look-alikes or not."""
    listed = set(names)
    return next((f for f in _families() if _has_mark(f, listed)), None)


def _has_mark(family: str, names: Iterable[str]) -> bool:
    return not spellings(family, known(family).mark).isdisjoint(names)


def look_alike(family: str, shapes: Shapes) -> str | None:
    """What a network is that a family may be mistaken for, or None."""
    for what, test in known(family).look_alikes.items():
        if callable(test):
            found = test(shapes)
        else:
            pattern = re.compile(rf"(?:.*\.)?(?:{test})")
            found = any(map(pattern.fullmatch, shapes))
        if found:
            return what
    return None


def looks_like_network(names: Iterable[str]) -> bool:
    """Whether a whole network of some family is among names, under any prefix.

    Its first layer must be there too: a stage of a hierarchical transformer (Swin) has
    a ViT's names otherwise.
    """
    listed = list(names)
    for family in _families():
        first = known(family).first
        for mark in spellings(family, known(family).mark):
            ends = [n for n in listed if n == mark or n.endswith(f".{mark}")]
            for prefix in {n.removesuffix(mark) for n in ends}:
                inner = (n.removeprefix(prefix) for n in listed if n.startswith(prefix))
                if any(canonical(family, name) in first for name in inner):
                    return True
    return False


def fields(family: str, shapes: Shapes) -> dict[str, Any]:
    """What the shapes say about `config.model`; what they leave open is left out.

    Args:
      family: as of `recognise`.
      shapes: of every array, PyTorch layouts, by name.

    Returns:
      Fields of `config.model` with their values; always "name".
    """
    own = _own_names(family, shapes)
    found = {"name": family} | known(family).fields(own)
    head = own.get(last_layer(family), ())
    if len(head) == 2 and head[0]:
        found["num_classes"] = head[0]
    return found


def channels(family: str, shapes: Shapes) -> int:
    """Channels of the images: inputs of the first convolution, or 3."""
    own = _own_names(family, shapes)
    for name in known(family).first:
        if len(own.get(name, ())) == 4:
            return own[name][1]
    return 3


def _own_names(family: str, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes by the family's own names, whatever the source calls the arrays."""
    return {canonical(family, name): tuple(shape) for name, shape in shapes.items()}
