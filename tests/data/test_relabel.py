"""Labels mean what the network's outputs mean, by the names of the classes."""

import pickle

import numpy as np
import pytest

from atebm_jax.data import ArraySource, relabel
from atebm_jax.errors import UserError


def source(names, labels=(0, 1, 2)):
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    return ArraySource(images, labels, class_names=names, spec="mine")


def labels(found):
    return [found[i]["label"] for i in range(len(found))]


def test_labels_follow_the_names_and_that_is_said():
    said = []
    found = relabel.follow(
        source(("cat", "ant", "dog")), ("ant", "cat", "dog"), "here", note=said.append
    )
    assert labels(found) == [1, 0, 2] and found.class_names == ("ant", "cat", "dog")
    assert [found[i]["image"][0, 0, 0] for i in range(3)] == [0, 1, 2]
    assert "class 0 is 'cat' there and 'ant' here" in said[0] and len(said) == 1
    assert labels(pickle.loads(pickle.dumps(found))) == [1, 0, 2]
    assert found.describe(1) == "mine[1]" and found.num_classes == 3


def test_equal_or_unknown_names_leave_a_source_alone():
    own = source(("ant", "cat", "dog"))
    for names in (None, ("ant", "cat", "dog"), ["ant", "cat", "dog"]):
        assert relabel.follow(own, names, "here", note=pytest.fail) is own
    nameless = ArraySource(np.zeros((2, 1, 1, 1), np.uint8), [0, 1])
    assert relabel.follow(nameless, ("a", "b"), "here", note=pytest.fail) is nameless


@pytest.mark.parametrize(
    ("own", "names", "message"),
    [
        (("1", "10", "2"), ("0", "1", "2"), "'0' and '10' say"),
        (("ant", "cat", "two"), ("ant", "cat", "dog"), "'dog' and 'two' say"),
        (("ant", "ant", "dog"), ("ant", "dog", "ant"), "one name stands for two"),
        (("ant", "cat", "dog"), ("ant", "cat"), "only one of them has 'dog'"),
    ],
)
def test_other_names_are_refused_unless_place_counts(own, names, message):
    with pytest.raises(UserError, match=f"here and the network .*{message}"):
        relabel.follow(source(own), names, "here")
    found = relabel.follow(source(own), None, "here")
    assert labels(found) == [0, 1, 2]


def test_order_of_another_network_is_found():
    names = ("ant", "cat", "dog")
    assert relabel.same_order(names, names, "it") is None
    order = relabel.same_order(("dog", "ant", "cat"), names, "it")
    assert [("dog", "ant", "cat")[k] for k in order] == list(names)
    with pytest.raises(UserError, match="it and the network"):
        relabel.same_order(("dog", "ant", "bee"), names, "it")
