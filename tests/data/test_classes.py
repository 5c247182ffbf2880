"""Which class a word means: names before places, no guessing."""

import numpy as np
import pytest

from atebm_jax import UserError
from atebm_jax.data import classes
from atebm_jax.sample.asked import parse_classes

DIGITS = [str(k) for k in range(10)]
ANIMALS = ["cat", "Dog", "dog", "Ox", "tench, Tinca tinca"]
# As folders of numbers are read: 2 lies behind 10.
SORTED = ["0", "1", "10", "11", "2"]
SHIFTED = ["1", "2", "three", "300"]


@pytest.mark.parametrize(
    ("word", "names", "place"),
    [
        ("7", DIGITS, 7),
        ("cat", ANIMALS, 0),
        ("CAT", ANIMALS, 0),
        ("dog", ANIMALS, 2),
        ("Dog", ANIMALS, 1),
        ("3", ANIMALS, 3),
        # A name that is no place of another class, and the other way round.
        ("300", SHIFTED, 3),
        ("3", SHIFTED, 3),
        ("10", SORTED, 2),
        ("name:2", SORTED, 4),
        ("place:2", SORTED, 2),
        ("place:3", SORTED, 3),
        ("name:dog", ANIMALS, 2),
        # A class may be called so.
        ("place:1", ["cat", "dog", "place:1"], 2),
    ],
)
def test_class_is_found_by_name_first(word, names, place):
    assert classes.find("--target", word, names) == place
    assert parse_classes("--target", word, names).tolist() == [place]


@pytest.mark.parametrize(
    ("word", "names", "message"),
    [
        # Name of one, place of another.
        ("2", SORTED, "2 is the name of class 4 and the place of class 2.*'10'"),
        ("1", SHIFTED, "name of class 0 and the place of class 1.*name:1 or .*place:1"),
        ("DOG", ANIMALS, "DOG may be 'Dog' at place 1, 'dog' at place 2"),
        ("cat", ["cat", "cat"], "'cat' at place 0, 'cat' at place 1.*place:0"),
        ("cow", ANIMALS, "cow: expected numbers from 0 to 4 or names"),
        ("10", DIGITS, "10: expected numbers from 0 to 9 or names"),
        ("place:10", DIGITS, "place:10: expected numbers"),
        ("name:10", DIGITS, "name:10: expected numbers"),
        ("9" * 5000, DIGITS, "expected numbers"),
        ("-1", DIGITS, "expected numbers"),
        ("", DIGITS, "expected numbers"),
    ],
)
def test_word_that_means_none_or_several_is_refused(word, names, message):
    with pytest.raises(UserError, match=f"--target=.*{message}"):
        classes.find("--target", word, names)


def test_several_classes_are_given_with_commas_and_a_name_may_have_one():
    assert parse_classes("--classes", "cat, Ox,2", ANIMALS).tolist() == [0, 3, 2]
    assert parse_classes("--classes", "tench, Tinca tinca", ANIMALS).tolist() == [4]
    np.testing.assert_array_equal(parse_classes("--classes", "all", DIGITS), range(10))


def test_class_called_like_a_word_of_the_command_is_refused_naming_both():
    with pytest.raises(UserError, match="all has a meaning .* of class 1.*name:all"):
        parse_classes("--classes", "all", ["none", "all"])
    assert parse_classes("--classes", "name:all", ["none", "all"]).tolist() == [1]
