"""Names of files: shown in letters, and told where no library can open them."""

import os

import pytest
import tiny

from atebm_jax import (
    UserError,
    checkpoint,
    compilation,
    data,
    job,
    names,
    storage,
)
from atebm_jax.convert import files
from atebm_jax.data import prepare

# What Python makes of the bytes b"caf\xe9".
LATIN = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (LATIN, r"caf\xe9"),
        ("caf\u00e9 \u732b", "caf\u00e9 \u732b"),
        ("a\tb\n\x1b[2J", r"a\tb\n\x1b[2J"),
        # A file's JSON may hold half of a letter, which is no byte of a name.
        ("a\ud800b", r"a\ud800b"),
    ],
)
def test_names_are_shown_in_letters_that_everything_takes(name, shown):
    assert names.printable(name) == shown
    assert names.printable(name).encode().decode() == shown


def test_texts_keep_their_lines():
    assert names.writable(f"a\n\t{LATIN}\ud800") == "a\n\tcaf\\xe9\\ud800"


def refused(path):
    """For each library that cannot open such a path: what a user calls, with it."""
    source = data.open_source("digits:test")
    return {
        "workdir": lambda: job.run(tiny.config(), path),
        "the path": lambda: checkpoint.load_weights(path),
        "--compilation_cache": lambda: compilation.use_cache(path, "run"),
        "--to of prepare": lambda: prepare.prepare(source, path),
        "the prepared set": lambda: data.open_source(f"prepared:{path}"),
        "data_dir": lambda: data.open_source("tfds:cifar10:test", path),
        "--to": lambda: storage.check_new_folder("--to", path),
    }


@pytest.mark.parametrize("what", refused(""))
def test_folder_that_a_library_cannot_open_is_refused_before_the_work(what, tmp_path):
    path = os.path.join(tmp_path, LATIN)
    word = what.removesuffix(" of prepare")
    with pytest.raises(UserError, match=rf"{word} .*caf\\xe9 has bytes .*no UTF-8"):
        refused(path)[what]()
    assert not os.listdir(tmp_path)


def test_folder_is_opened_by_a_link_with_another_name(tmp_path):
    behind = tmp_path / LATIN
    behind.mkdir()
    (tmp_path / "set").symlink_to(behind)
    source = data.open_source("digits:test")
    prepare.prepare(source, tmp_path / "set", indices=range(3), num_workers=1)
    assert len(data.open_source(f"prepared:{tmp_path / 'set'}")) == 3


def test_file_with_such_a_name_is_exported(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    with storage.appears_whole(tmp_path / LATIN) as made:
        numpy.save_file({"a": data.open_source("digits:test")[0]["image"]}, made)
    assert files.open_source(tmp_path / LATIN).tree["a"].shape == (8, 8, 1)
