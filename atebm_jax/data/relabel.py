"""Labels by the names of the classes, wherever images meet a network."""

from collections.abc import Callable, Iterator, Sequence

from atebm_jax.data.sources import UNLABELLED, Example, Source, listing
from atebm_jax.errors import UserError


class Relabelled(Source):
    """A source whose classes, named as a network's, get the network's numbers."""

    def __init__(self, source: Source, names: Sequence[str]):
        self.spec, self.num_classes = source.spec, len(names)
        self.class_names = tuple(names)
        self._source = source
        number_of = {name: number for number, name in enumerate(names)}
        self._numbers = [number_of[name] for name in source.class_names or ()]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        label = example["label"]
        known = UNLABELLED if label == UNLABELLED else self._numbers[label]
        return {"image": example["image"], "label": known}

    def describe(self, index: int) -> str:
        return self._source.describe(index)

    def listing(self) -> Iterator[bytes]:
        return listing(self._source)


def follow(
    source: Source,
    names: Sequence[str] | None,
    what: str,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> Source:
    """A source whose labels mean what a network's outputs mean.

    Args:
      source: labelled images.
      names: of the network's classes, by number; None where it names none, or where
        class k of the source is its class k, whatever their names.
      what: which images they are, for messages: "config.data.test=folder:PATH".
      note: takes a line for the user, where labels follow the names.

    Returns:
      The source itself, or the same images with labels that follow the names.

    Raises:
      UserError: it names other classes.
    """
    own = source.class_names
    if names is None or own is None or not same_order(own, names, what):
        return source
    moved = next(k for k, name in enumerate(own) if name != names[k])
    note(
        f"{what} has the classes of the network in another order (class {moved} is "
        f"{own[moved]!r} there and {names[moved]!r} here): its labels follow the names."
    )
    return Relabelled(source, names)


def same_order(own: Sequence[str], names: Sequence[str], what: str) -> list[int] | None:
    """Where the classes of a network stand in another list: names[k] == own[order[k]].

    Returns:
      None where the order is the same.

    Raises:
      UserError: the classes are others.
    """
    if tuple(own) == tuple(names):
        return None
    if sorted(own) == sorted(names) and len(set(own)) == len(own):
        return [list(own).index(name) for name in names]
    foreign = [name for name in own if name not in names]
    absent = [name for name in names if name not in own]
    if foreign and absent:
        first = f"{absent[0]!r} and {foreign[0]!r} say"
    elif foreign or absent:
        first = f"only one of them has {(foreign + absent)[0]!r}"
    else:
        first = "one name stands for two classes"
    raise UserError(
        f"{what} and the network name their classes differently, {first}: labels must "
        "mean the same in both. Rename the classes, or give --classes_by_place if "
        "class 0 of the one is class 0 of the other, and so on."
    )
