"""Damaged and hostile checkpoint files load the same values or are refused."""

import functools
import io
import json
import pickle
import pickletools
import struct
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from budget import budget
from hypothesis import event, given
from hypothesis import strategies as st

from atebm_jax import UserError
from atebm_jax.convert import files, importing, layouts, names, normalization
from atebm_jax.models import wide_resnet

sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))

import written

# What reading may take beside sixteen times the file.
_MOST_BYTES = 2**26


def small_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"conv.weight": (4, 3, 2, 2), "conv.bias": (4,), "fc.weight": (2, 4)}
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def as_zip(path: Path, arrays: dict[str, np.ndarray], **options: Any) -> Path:
    return written.zip_file(path, program(arrays), records(arrays), **options)


def as_stream(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    return written.stream_file(path, program(arrays), records(arrays))


def as_safetensors(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    pytest.importorskip("safetensors.numpy").save_file(arrays, path)
    return path


def program(arrays: dict[str, np.ndarray]) -> bytes:
    tensors = {}
    for key, (name, x) in enumerate(arrays.items()):
        strides = tuple(s // x.itemsize for s in x.strides)
        tensors[name] = written.tensor(str(key), x.size, x.shape, strides)
    return written.program(written.mapping(tensors))


def records(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {str(key): x.tobytes() for key, x in enumerate(arrays.values())}


WRITERS = {
    "zip": as_zip,
    "stream": as_stream,
    "tar": written.tar_file,
    "safetensors": as_safetensors,
}


def read(path: Path) -> dict[str, np.ndarray] | None:
    """The weights, or None where one clear line refuses them; in bounded memory."""
    allowed = 16 * path.stat().st_size + _MOST_BYTES
    tracemalloc.start()
    try:
        source = files.open_source(path)
        arrays = layouts.read_arrays(source, layouts.find(source))
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        assert len(str(error)) < 2000
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < allowed, peak
    return arrays


def written_bytes(folder: Path, kind: str) -> bytes:
    path = folder / f"seed.{'safetensors' if kind == 'safetensors' else 'pt'}"
    return WRITERS[kind](path, small_arrays()).read_bytes()


def put(folder: Path, kind: str, content: bytes) -> Path:
    path = folder / f"made.{'safetensors' if kind == 'safetensors' else 'pt'}"
    path.write_bytes(content)
    return path


def assert_same(arrays: dict[str, np.ndarray]) -> None:
    expected = small_arrays()
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name])


KINDS = st.sampled_from(sorted(WRITERS))


@budget(60)
@given(KINDS, st.floats(0, 1), st.integers(0, 64))
def test_truncated_file_loads_the_same_values_or_none(
    tmp_path_factory, kind, part, more
):
    folder = tmp_path_factory.mktemp("cut")
    whole = written_bytes(folder, kind)
    size = min(
        max(int(part * len(whole)), len(whole) - more if part > 0.9 else 0), len(whole)
    )
    arrays = read(put(folder, kind, whole[:size]))
    event("refused" if arrays is None else "read")
    if arrays is not None:
        assert_same(arrays)


@st.composite
def damage(draw: Any) -> Any:
    """(place as a fraction, new bytes, whether they replace or are put between)."""
    changes = []
    for _ in range(draw(st.integers(1, 4))):
        body = draw(
            st.one_of(st.binary(min_size=1, max_size=4), st.binary(max_size=40))
        )
        changes.append((draw(st.floats(0, 1)), body, draw(st.booleans())))
    return changes


@budget(150)
@given(KINDS, damage())
def test_changed_bytes_are_noticed_or_only_change_values(
    tmp_path_factory, kind, changes
):
    """Only zip archives have checksums: elsewhere a number may become another."""
    folder = tmp_path_factory.mktemp("changed")
    content = bytearray(written_bytes(folder, kind))
    for part, body, replace in changes:
        start = int(part * len(content))
        content[start : start + len(body) * replace] = body
    arrays = read(put(folder, kind, bytes(content)))
    event("refused" if arrays is None else "read")
    for array in (arrays or {}).values():
        assert array.dtype.kind in "fiub" and array.size


@st.composite
def opcodes(draw: Any) -> bytes:
    """A pickle of opcodes in any order, with arguments that fit or do not."""
    pieces = [b"\x80\x04"]
    known = [written.name("torch", "FloatStorage"), written.name("builtins", "list")]
    known += [written.name("collections", "OrderedDict"), written.text("storage")]
    known += [written.name("torch._utils", "_rebuild_tensor_v2"), written.number(7)]
    known += [written.storage("0", 48), written.tensor("0", 48, (4, 12), (12, 1))]
    known += [written.name("numpy", "dtype"), written.name("os", "system")]
    plain = [op.code.encode("latin1") for op in pickletools.opcodes if op.arg is None]
    for _ in range(draw(st.integers(1, 30))):
        kind = draw(st.integers(0, 9))
        if kind < 4:
            pieces.append(draw(st.sampled_from(known)))
        elif kind < 9:
            pieces.append(draw(st.sampled_from(plain)))
        else:
            pieces.append(draw(st.binary(max_size=12)))
    return b"".join(pieces) + b"."


@budget(150)
@given(opcodes(), st.booleans())
def test_any_pickle_is_read_as_data_or_refused(tmp_path_factory, pickled, in_zip):
    path = tmp_path_factory.mktemp("pickle") / "made.pt"
    if in_zip:
        written.zip_file(path, pickled, {"0": written.floats(48)})
    else:
        path.write_bytes(pickled)
    event("refused" if read(path) is None else "read")


_NAMES = ("archive/data.pkl", "data.pkl", "archive/data/0", "archive/data/1")
_NAMES += ("archive/byteorder", "archive/version", "../data.pkl", "archive/data/", "")
_NAMES += ("archive/constants.pkl", "a/data.pkl", "archive/data/0\x00", "/data.pkl")


@budget(60)
@given(st.lists(st.tuples(st.sampled_from(_NAMES), st.integers(0, 6)), max_size=6))
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_any_entries_of_a_zip_are_read_or_refused(tmp_path_factory, entries):
    arrays = small_arrays()
    bodies = [program(arrays), *records(arrays).values(), b"", b"little", b"\x80\x02}."]
    path = tmp_path_factory.mktemp("zip") / "made.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bodies[0])
        for key, data in records(arrays).items():
            archive.writestr(f"archive/data/{key}", data)
        for name, body in entries:
            if name:
                archive.writestr(name, bodies[body])
    event("refused" if read(path) is None else "read")


_DTYPES = ("F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "C64", "F4", "")
_SIZES = st.one_of(st.integers(-2, 300), st.sampled_from((2**31, 2**62, 2**64, 2**70)))


@st.composite
def safetensors_headers(draw: Any) -> bytes:
    """A header with absurd types, shapes, places or JSON, and its length."""
    header: dict[str, Any] = {}
    place = 0
    for name in draw(st.lists(st.sampled_from("abcd"), unique=True, max_size=4)):
        shape = draw(st.lists(st.one_of(st.integers(0, 4), _SIZES), max_size=3))
        end = draw(
            st.one_of(st.just(place + 4 * int(np.prod(shape, dtype=object))), _SIZES)
        )
        start = draw(st.one_of(st.just(place), st.just(place), _SIZES))
        kind = draw(st.sampled_from(("F32", "F32", *_DTYPES)))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        place = end
    if draw(st.booleans()):
        values = ("[0.5]", "[NaN]", "[" * 9999, "{}", '"ab"', "[1e999]", "[-1]", "3")
        keys = st.sampled_from(("atebm_jax.mean", "atebm_jax.std", "format"))
        texts = st.dictionaries(keys, st.sampled_from(values), max_size=3)
        header["__metadata__"] = draw(texts)
    encoded = json.dumps(header).encode()
    if draw(st.integers(0, 4)) == 0:
        encoded = draw(st.sampled_from((b"{" * 5000, b'{"a":' * 5000, b"[]", b"{}x")))
    wrong = draw(st.one_of(st.none(), st.none(), _SIZES))
    length = len(encoded) if wrong is None else wrong % 2**64
    return struct.pack("<Q", length) + encoded


@budget(80)
@given(safetensors_headers(), st.integers(0, 1200))
def test_any_header_of_safetensors_is_read_or_refused(tmp_path_factory, head, room):
    pytest.importorskip("safetensors")
    path = tmp_path_factory.mktemp("safe") / "made.safetensors"
    path.write_bytes(head + bytes(room))
    event("refused" if read(path) is None else "read")


PIXELS = normalization.parse("none", None, None)
NETWORK = wide_resnet.network(depth=10, widen_factor=1, num_classes=3)


@functools.cache
def variables() -> Any:
    return reference.random_variables(NETWORK, (8, 8, 1))


def network_arrays() -> dict[str, np.ndarray]:
    return names.to_torch("wide_resnet", variables())


@st.composite
def network_changes(draw: Any) -> list[tuple[int, str, Any]]:
    """Which array becomes what."""
    shapes = st.lists(st.sampled_from((0, 1, 2, 3, 4, 16, 17, 64)), max_size=5)
    others = (
        "layer1.0.conv1.weight",
        "blocks.0.attn.qkv.weight",
        "stages.0.0.dwconv.weight",
    )
    others += ("features.1.0.block.0.weight", "mean", "std", "module.mean", "pos_embed")
    others += (
        "stem.0.weight",
        "head.weight",
        "block1.layer.9.conv1.weight",
        "n_averaged",
    )
    others += (
        "",
        ".",
        "a..b",
        "block1.layer.\u0663.conv1.weight",
        "module." * 40 + "x",
    )
    kinds = ("float16", "float64", "int8", "int64", "bool")
    return draw(
        st.lists(
            st.one_of(
                st.tuples(st.integers(0, 40), st.just("shape"), shapes),
                st.tuples(st.integers(0, 40), st.just("name"), st.sampled_from(others)),
                st.tuples(st.integers(0, 40), st.just("add"), st.sampled_from(others)),
                st.tuples(st.integers(0, 40), st.just("dtype"), st.sampled_from(kinds)),
                st.tuples(st.integers(0, 40), st.just("drop"), st.none()),
                st.tuples(
                    st.integers(0, 40),
                    st.just("value"),
                    st.sampled_from((np.nan, np.inf, 1e30, 0.0)),
                ),
            ),
            max_size=3,
        )
    )


def changed(changes: list[tuple[int, str, Any]]) -> dict[str, np.ndarray]:
    arrays = network_arrays()
    for place, what, value in changes:
        if not arrays:
            break
        name = list(arrays)[place % len(arrays)]
        if what == "shape":
            arrays[name] = np.ones(value, np.float32)
        elif what == "name":
            arrays[value] = arrays.pop(name)
        elif what == "add":
            arrays[value] = arrays[name]
        elif what == "dtype":
            arrays[name] = arrays[name].astype(value)
        elif what == "drop":
            del arrays[name]
        else:
            arrays[name] = np.full_like(arrays[name], value)
    return arrays


@budget(25)
@given(network_changes())
def test_any_state_dict_is_imported_whole_or_refused(tmp_path_factory, changes):
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path_factory.mktemp("network") / "made.safetensors"
    arrays = changed(changes)
    safetensors.save_file(arrays, path)
    with pytest.MonkeyPatch.context() as patch:
        # Its compilation takes seconds and sees nothing of the file.
        patch.setattr(importing, "probe_logits", lambda *arguments: np.zeros(3))
        try:
            made = importing.read(path, asked=PIXELS)
        except UserError as error:
            event("refused")
            assert "\n" not in str(error)
            return
    event("imported")
    back = names.to_torch("wide_resnet", made.variables)
    for name, array in back.items():
        np.testing.assert_array_equal(array, arrays[name].astype(np.float32))


def bomb(body: bytes) -> bytes:
    """A whole pickle whose value is what the opcodes leave."""
    return b"\x80\x04" + body + b"."


def test_one_text_cannot_be_copied_without_end(tmp_path):
    """200 kB that would become a hundred gigabytes."""
    encode = written.name("_codecs", "encode") + b"\x94" + written.text("x" * 200_000)
    copies = b"h\x00h\x01\x85R" * 20_000
    path = tmp_path / "made.pt"
    path.write_bytes(bomb(b"(" + encode + b"\x94" + copies + b"t"))
    assert read(path) is None


def doubled(first: bytes, pair: bytes, times: int = 200) -> bytes:
    """A value that holds the one before twice, and so on: endless when walked."""
    body = first + b"\x94"
    for index in range(times):
        get = b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index)
        body += get + get + pair + b"\x94"
    return body


@pytest.mark.parametrize(
    "use",
    [
        # As a function, a class, a type of storage or tensor, a key, an encoding.
        lambda value: value + b")R",
        lambda value: value + b")\x81",
        lambda value: b"}" + value + b"Ns",
        lambda value: (
            written.name("_codecs", "encode") + written.text("x") + value + b"\x86R"
        ),
        lambda value: written.name("numpy", "dtype") + value + b"\x85R",
        lambda value: (
            b"("
            + written.text("storage")
            + value
            + written.text("0")
            + written.text("cpu")
            + written.number(1)
            + b"tQ"
        ),
    ],
)
@pytest.mark.parametrize(
    "first, pair",
    [
        (b")", b"\x86"),
        (
            written.name("a", "b") + b")\x81",
            b"\x86" + b"\x94" + written.name("a", "b") + b"h\x00\x81",
        ),
    ],
    ids=["tuples", "instances"],
)
def test_value_that_is_endless_when_walked_is_refused_at_once(
    tmp_path, use, first, pair
):
    if first == b")":
        value = doubled(first, pair)
    else:
        # Each instance has the one before twice as its arguments.
        value = written.name("a", "b") + b"\x94)\x81\x94"
        for index in range(1, 200):
            value += (
                b"h\x00h" + bytes([index]) + b"h" + bytes([index]) + b"\x86\x81\x94"
            )
    path = written.zip_file(tmp_path / "made.pt", bomb(value + b"0" + use(b"h\xc8")))
    assert read(path) is None


def test_one_mapping_held_many_times_is_refused(tmp_path):
    """Three levels of ten thousand names for one mapping: 10^12 ways through."""
    body = b"}\x94"
    for level in range(3):
        get = b"h" + bytes([level])
        items = b"".join(written.text(str(i)) + get for i in range(10_000))
        body += b"0}(" + items + b"u\x94"
    path = written.zip_file(tmp_path / "made.pt", bomb(body))
    with pytest.raises(UserError, match="more than 1,000,000 entries"):
        layouts.find(files.open_source(path))


def test_list_of_storages_with_a_deep_key_is_refused(tmp_path):
    """Python's hash of a deep tuple overflows the stack and ends the process."""
    body = written.mapping({"w": written.tensor("0", 2, (2,), (1,))})
    path = written.stream_file(tmp_path / "made.pt", written.program(body))
    head = path.read_bytes()[: -len(pickle.dumps([], protocol=2))]
    path.write_bytes(head + b"\x80\x02](" + b")" + b"\x85" * 150_000 + b"e.")
    assert read(path) is None


def test_sparse_member_of_a_tar_file_is_not_unpacked(tmp_path):
    """Half a terabyte of zeros in a few bytes."""
    path = tmp_path / "made.pt"
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1"}
            info.pax_headers |= {"GNU.sparse.map": "0,0", "GNU.sparse.size": f"{2**39}"}
            archive.addfile(info, io.BytesIO())
    assert read(path) is None


def test_wrappers_without_end_are_refused(tmp_path):
    arrays = {"net." * 500 + name: x for name, x in small_arrays().items()}
    path = as_zip(tmp_path / "made.pt", arrays)
    with pytest.raises(UserError, match="more than 32 wrappers"):
        layouts.find(files.open_source(path))


def test_numbers_shared_by_many_names_are_not_copied_without_end(tmp_path):
    half = written.tensor("0", 40_000, (40_000,), (1,), kind="HalfStorage")
    body = written.mapping({f"a{i}.weight": half for i in range(300)} | {"b": half})
    matrix = written.tensor("0", 40_000, (200, 200), (200, 1), kind="HalfStorage")
    body = written.mapping({f"a{i}": matrix for i in range(300)})
    path = written.zip_file(
        tmp_path / "made.pt", written.program(body), {"0": bytes(80_000)}
    )
    source = files.open_source(path)
    with pytest.raises(UserError, match="share their numbers"):
        layouts.read_arrays(source, layouts.find(source))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 4), np.float32),
        np.zeros((2, 2), np.complex64),
        np.zeros((2, 2), "V2"),
    ],
)
def test_arrays_without_real_numbers_are_refused_by_name(array, tmp_path):
    weights = layouts.Weights({"fc.weight": array})
    path = as_zip(tmp_path / "made.pt", small_arrays())
    with pytest.raises(UserError, match="fc.weight.*expected real numbers"):
        layouts.read_arrays(files.open_source(path), weights)


@pytest.mark.parametrize(
    ("name", "text"),
    [("mean", "[" * 9999), ("std", "[0.0]"), ("std", "[-1.0]"), ("mean", "[NaN]")],
)
def test_metadata_that_normalises_nothing_is_refused(name, text, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    texts = {"atebm_jax.mean": "[0.5]", "atebm_jax.std": "[0.5]"}
    path = tmp_path / "made.safetensors"
    numpy.save_file(small_arrays(), path, metadata=texts | {f"atebm_jax.{name}": text})
    if text.startswith("[["):
        assert not layouts.find(files.open_source(path)).constants
        return
    with pytest.raises(UserError, match="metadata has mean .* and std "):
        layouts.find(files.open_source(path))


@pytest.mark.parametrize(
    "name", ["block1.layer.0.conv1.weight", "conv1.weight", "fc.weight"]
)
def test_single_number_in_a_weights_place_is_refused(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    arrays = network_arrays() | {name: np.ones((), np.float32)}
    safetensors.save_file(arrays, tmp_path / "made.safetensors")
    with pytest.raises(UserError, match="made.safetensors|must be positive"):
        importing.read(tmp_path / "made.safetensors")


def test_network_for_other_channels_is_refused(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    arrays = network_arrays() | {"conv1.weight": np.ones((16, 5, 3, 3), np.float32)}
    safetensors.save_file(arrays, tmp_path / "made.safetensors")
    with pytest.raises(UserError, match="images of 5 channels"):
        importing.read(tmp_path / "made.safetensors")
