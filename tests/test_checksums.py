"""Checksums of a checkpoint's files: what they notice, and who else can read them."""

import hashlib
import shutil
import subprocess

import pytest
from etils import epath

from atebm_jax import checksums

# FIPS 180-4, appendix: the digest of "abc".
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def step(tmp_path):
    """A folder as Orbax leaves one, with its list."""
    for name in ("state/d/0", "state/manifest", "meta/metadata", "a name  of two"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("abc")
    checksums.write(epath.Path(tmp_path))
    # What Orbax adds afterwards.
    (tmp_path / "commit_success.txt").write_text("yes")
    return epath.Path(tmp_path)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


DAMAGE = {
    flip: "was truncated or altered",
    truncate: "was truncated or altered",
    empty: "is empty",
    lambda path: path.unlink(): "is missing",
}


def test_list_holds_the_digest_of_every_file(step):
    header, *lines = (step / checksums.FILE).read_text().splitlines()
    assert lines == [
        f"{ABC}  {name}"
        for name in ("a name  of two", "meta/metadata", "state/d/0", "state/manifest")
    ]
    text = "".join(f"{line}\n" for line in lines)
    assert header.endswith(hashlib.sha256(text.encode()).hexdigest())


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="there is no sha256sum")
def test_sha256sum_reads_the_list(step):
    command = ["sha256sum", "--check", "--strict", checksums.FILE]
    assert subprocess.check_output(command, cwd=step, text=True).count(": OK") == 4


def test_undamaged_folder_passes(step):
    assert checksums.exist(step) and checksums.damage(step) is None


@pytest.mark.parametrize("name", ["state/d/0", "meta/metadata"])
@pytest.mark.parametrize("spoil", DAMAGE)
def test_damaged_file_is_named(step, name, spoil):
    spoil(step / name)
    assert checksums.damage(step).startswith(f"{name} {DAMAGE[spoil]}")


def cut_a_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize("spoil", [flip, truncate, empty, cut_a_line])
def test_damaged_list_is_named(step, spoil):
    spoil(step / checksums.FILE)
    assert checksums.damage(step) == f"{checksums.FILE} is incomplete or was altered"


def test_folder_without_a_list_passes(step):
    (step / checksums.FILE).unlink()
    flip(step / "state/d/0")
    assert not checksums.exist(step) and checksums.damage(step) is None


def test_each_file_is_read_by_one_of_the_processes(step):
    flip(step / "state/d/0")
    found = [checksums.damage(step, part, 3) for part in range(3)]
    assert sum(fault is not None for fault in found) == 1


def test_file_that_is_added_later_does_no_harm(step):
    (step / "notes.txt").write_text("mine")
    assert checksums.damage(step) is None
