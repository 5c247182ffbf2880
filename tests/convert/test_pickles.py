"""Nothing in a checkpoint runs: what asks for more than weights is refused by name."""

import functools
import io
import pickle
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
import written

from atebm_jax import UserError
from atebm_jax.convert import files, pickles
from atebm_jax.convert.values import Damaged, Inert, Refused


class Calls:
    """Pickled, a call of any function."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


class Restores:
    """Pickled, an instance whose restored state would run a command."""

    def __init__(self, command):
        self.command = command

    def __setstate__(self, state):
        subprocess.run(state["command"], shell=True, check=True)


def attacks(command):
    """Pickles that would run a command, and what the refusal must name."""
    shell = written.text(command)
    arguments = b"(" + shell + b"t"
    posix = Calls(__import__("os").system, command)
    return {
        "reduce, protocol 0": (pickle.dumps(posix, 0), "system"),
        "reduce, protocol 2": (pickle.dumps(posix, 2), "system"),
        "reduce, protocol 4": (pickle.dumps(posix, 4), "system"),
        "os.system": (
            written.program(written.name("os", "system") + arguments + b"R"),
            "os.system",
        ),
        "inst": (b"(" + shell + b"ios\nsystem\n.", "os.system"),
        "obj": (b"(" + written.name("os", "system") + shell + b"o.", "os.system"),
        "newobj": (
            written.program(written.name("subprocess", "Popen") + arguments + b"\x81"),
            "subprocess.Popen",
        ),
        "newobj with keywords": (
            b"\x80\x04" + written.name("subprocess", "Popen") + arguments + b"}\x92.",
            "subprocess.Popen",
        ),
        "setstate": (pickle.dumps(Restores(command), 2), "whole object of class"),
        "state of a module's class": (
            written.program(written.name("os", "environ") + b"}b"),
            "os.environ",
        ),
        "eval": (pickle.dumps(Calls(eval, "1"), 2), "eval"),
        "exec": (pickle.dumps(Calls(exec, "import os"), 2), "exec"),
        "import": (pickle.dumps(Calls(__import__, "os"), 2), "__import__"),
        "getattr": (pickle.dumps(Calls(getattr, 1, "real"), 2), "getattr"),
        "partial": (
            pickle.dumps(functools.partial(subprocess.getoutput, command), 2),
            "functools",
        ),
        "nested pickle": (
            written.program(
                written.name("torch.storage", "_load_from_bytes")
                + b"("
                + b"C\x02N."
                + b"tR"
            ),
            "torch.storage._load_from_bytes",
        ),
        "result of a call": (
            written.program(
                written.name("dill._dill", "_get_attr")
                + b"("
                + written.text("os")
                + written.text("system")
                + b"tR"
                + arguments
                + b"R"
            ),
            r"_get_attr\(os, system\)",
        ),
        "persistent id": (written.program(shell + b"Q"), "outside the file"),
        "extension": (b"\x80\x02\x82\x01.", "EXT1"),
        "memory": (
            written.program(
                written.name("builtins", "bytearray") + b"(I1000000000000\ntR"
            ),
            "builtins.bytearray",
        ),
        "objects in an array": (
            pickle.dumps(np.array([None, posix], dtype=object), 2),
            "numpy.dtype",
        ),
        "tensor type": (
            written.program(
                written.name("torch._tensor", "_rebuild_from_type_v2")
                + b"("
                + written.name("os", "system")
                + b"N"
                + arguments
                + b"NtR"
            ),
            "os.system",
        ),
    }


KINDS = sorted(attacks("x"))
CONTAINERS = {"zip": written.zip_file, "stream": written.stream_file}


@pytest.mark.parametrize("container", [*CONTAINERS, "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_malicious_file_is_refused_by_name_and_nothing_runs(kind, container, tmp_path):
    marker = tmp_path / "it_ran"
    pickled, named = attacks(f"touch {marker}")[kind]
    path = tmp_path / "weights.pt"
    if container == "plain":
        path.write_bytes(pickled)
    else:
        CONTAINERS[container](path, pickled)
    from atebm_jax.convert import layouts

    with pytest.raises(UserError, match=named) as caught:
        layouts.find(files.open_source(path))
    assert not marker.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["reduce, protocol 4", "inst", "newobj"])
def test_attack_beside_good_weights_is_refused_too(kind, tmp_path):
    marker = tmp_path / "it_ran"
    pickled, named = attacks(f"touch {marker}")[kind]
    attack = pickled.removesuffix(b".")
    attack = attack[2:] if attack[:1] == b"\x80" else attack
    attack = attack[9:] if attack[:1] == b"\x95" else attack
    weights = written.tensor("0", 6, (2, 3), (3, 1))
    body = written.mapping({"model": written.mapping({"w": weights}), "args": attack})
    path = written.zip_file(
        tmp_path / "w.pt", written.program(body), {"0": written.floats(6)}
    )
    with pytest.raises(UserError, match=named):
        files.open_source(path)
    assert not marker.exists()


def test_the_attacks_would_work_on_python_itself(tmp_path):
    """What the tests above rest on: these pickles do run a command."""
    for index, kind in enumerate(["reduce, protocol 4", "inst", "obj", "setstate"]):
        marker = tmp_path / f"ran{index}"
        pickled, _ = attacks(f"touch {marker}")[kind]
        pickle.loads(pickled)
        assert marker.exists()


def test_names_are_never_imported():
    assert "antigravity" not in sys.modules
    value = pickles.load(
        io.BytesIO(written.program(written.name("antigravity", "fly")))
    )
    assert str(value) == "antigravity.fly"
    assert "antigravity" not in sys.modules


def test_classes_of_training_states_stay_inert_data():
    body = written.name("cox.utils", "Parameters") + b")\x81" + b"}b"
    value = pickles.load(io.BytesIO(written.program(body)))
    assert isinstance(value, Inert) and value.kind == "cox.utils.Parameters"
    assert value.state == {}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_is_what_python_reads(protocol):
    value = {
        "text": "é",
        "bytes": b"\x00\xff",
        "numbers": [1, -(2**70), 2.5, True, None],
        "sets": [{1, 2}, frozenset({"a"})],
        "pair": (1, (2, 3)),
        3: {"nested": [[]]},
    }
    read = pickles.load(io.BytesIO(pickle.dumps(value, protocol)))
    assert read == value


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_and_scalars_of_numpy_are_read(protocol, order):
    arrays = [
        np.asarray(np.arange(6.0).reshape(2, 3), order=order),
        np.arange(4, dtype=">i2"),
        np.array(True),
    ]
    made = pickles.load(io.BytesIO(pickle.dumps([*arrays, np.float64(2.5)], protocol)))
    for read, array in zip(made, arrays, strict=False):
        np.testing.assert_array_equal(read, array)
    assert made[-1] == 2.5


def test_array_of_one_number_may_be_given_to_a_call():
    array = pickle.dumps(np.array(2.0), 2).removesuffix(b".")[2:]
    body = written.name("argparse", "Namespace") + array + b"\x85R"
    read = pickles.load(io.BytesIO(written.program(body)))
    assert read.arguments == (2.0,)


@pytest.mark.parametrize("cut", [0, 1, 5, 20, -1])
def test_pickle_that_breaks_off_is_damaged(cut):
    data = pickle.dumps({"a": [1, 2, 3], "b": "text" * 10}, 2)[:cut]
    with pytest.raises(Damaged):
        pickles.load(io.BytesIO(data))


def test_noise_never_does_more_than_fail():
    data = bytearray(pickle.dumps({"a": [1, 2.0, "x"], "b": (None, {1})}, 2))
    rng = np.random.default_rng(0)
    for _ in range(2000):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            changed[place] = rng.integers(256)
        try:
            pickles.load(io.BytesIO(bytes(changed)))
        except (Damaged, Refused):
            pass


def test_announced_sizes_take_no_memory():
    huge = b"\x8e" + (2**40).to_bytes(8, "little") + b"x"
    with pytest.raises(Damaged):
        pickles.load(io.BytesIO(b"\x80\x04" + huge))
    far = b"\x80\x02Nr\xff\xff\xff\x7f."
    assert pickles.load(io.BytesIO(far)) is None


def test_deep_nesting_is_refused_as_a_key():
    with pytest.raises(Damaged):
        pickles.load(io.BytesIO(b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"Ns."))


def test_record_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    weights = written.mapping({"w": written.tensor("0", 2**22, (2**22, 1), (1, 1))})
    path = written.zip_file(
        tmp_path / "bomb.pt",
        written.program(weights),
        {"0": bytes(2**24)},
        zipfile.ZIP_DEFLATED,
    )
    assert path.stat().st_size < 2**18
    with pytest.raises(UserError, match="compressed record"):
        files.open_source(path)


@pytest.mark.parametrize("place", [20, 24])
def test_record_larger_than_its_file_is_not_read(place, tmp_path):
    """Sizes, packed and unpacked, of the pickle in the archive's directory."""
    weights = written.mapping({"w": written.tensor("0", 6, (2, 3), (3, 1))})
    path = written.zip_file(
        tmp_path / "w.pt", written.program(weights), {"0": written.floats(6)}
    )
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\x01\x02") + place
    content[start : start + 4] = (900_000_000).to_bytes(4, "little")
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError, match="data.pkl' of 900000000 bytes"):
        files.open_source(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


@pytest.mark.parametrize(
    ("count", "shape", "strides", "offset"),
    [
        (6, (10**6, 10**6), (0, 0), 0),
        (6, (2, 4), (4, 1), 0),
        (6, (2, 3), (3, 1), 1),
        (6, (2, -3), (3, 1), 0),
        (10**12, (10**6, 10**6), (10**6, 1), 0),
    ],
)
def test_tensor_outside_its_storage_is_refused(count, shape, strides, offset, tmp_path):
    tensor = written.tensor("0", count, shape, strides, offset)
    path = written.zip_file(
        tmp_path / "w.pt",
        written.program(written.mapping({"w": tensor})),
        {"0": written.floats(6)},
    )
    with pytest.raises(UserError, match="truncated, damaged"):
        source = files.open_source(path)
        source.read(source.tree["w"])


def test_storage_key_cannot_name_another_file(tmp_path):
    tensor = written.tensor("../../etc/passwd", 6, (2, 3), (3, 1))
    path = written.zip_file(
        tmp_path / "w.pt", written.program(written.mapping({"w": tensor}))
    )
    source = files.open_source(path)
    with pytest.raises(UserError, match="no record"):
        source.read(source.tree["w"])


def test_message_cannot_steer_the_terminal(tmp_path):
    body = written.text("os\x1b[2J") + written.text("system") + b"\x93)R"
    path = tmp_path / "w.pt"
    path.write_bytes(b"\x80\x04" + body + b".")
    with pytest.raises(UserError, match=r"os\\x1b\[2J.system"):
        files.open_source(path)
