"""Checkpoint files of every age, and files that are none."""

import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import written

from atebm_jax import UserError
from atebm_jax.convert import files


def read_all(path):
    source = files.open_source(path)
    return {name: source.read(value) for name, value in source.tree.items()}


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "conv.weight": rng.normal(size=(4, 3, 2, 2)).astype(np.float32),
        "fc.bias": rng.normal(size=5).astype(np.float32),
        "scalar": np.array(0.5, np.float32),
    }


@pytest.mark.parametrize("kind", ["zip", "stream", 2, 3, 4, 5])
def test_what_torch_saves_is_read_bit_by_bit(kind, arrays, tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32)
    state = {name: torch.tensor(x) for name, x in arrays.items()}
    state |= {
        "transposed": base.reshape(4, 6).T,
        "slice": base[3:9],
        "same storage": base,
        "empty": torch.zeros(0, 3),
        "half": torch.tensor([1.5, -2.0]).half(),
        "bfloat16": torch.tensor([1.5, -2.0]).bfloat16(),
        "double": torch.tensor([1.5, -2.0]).double(),
        "int64": torch.tensor(7),
        "bool": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    options = {"_use_new_zipfile_serialization": kind != "stream"}
    if isinstance(kind, int):
        options["pickle_protocol"] = kind
    path = tmp_path / "state.pt"
    torch.save(state, path, **options)
    read = read_all(path)
    assert list(read) == list(state)
    for name, value in state.items():
        expected = value.detach()
        if name == "bfloat16":
            assert read[name].dtype.name == "bfloat16"
            expected = expected.float()
            np.testing.assert_array_equal(read[name].astype(np.float32), expected)
            continue
        assert read[name].dtype == expected.numpy().dtype
        np.testing.assert_array_equal(read[name], expected.numpy())


def test_whole_training_state_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    import argparse

    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    state = {
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "args": argparse.Namespace(lr=0.1, path=__import__("pathlib").Path("x")),
        "best": np.float64(0.5),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "size": torch.Size([1, 2]),
    }
    torch.save(state, tmp_path / "state.ckpt")
    tree = files.open_source(tmp_path / "state.ckpt").tree
    assert tree["best"] == 0.5 and tree["size"] == (1, 2)
    assert tree["args"].state["lr"] == 0.1


def test_oldest_tar_format_is_read(arrays, tmp_path):
    arrays = {k: np.atleast_1d(v) for k, v in arrays.items()}
    path = written.tar_file(tmp_path / "old.tar", arrays)
    for name, value in read_all(path).items():
        np.testing.assert_array_equal(value, arrays[name])


def test_tar_file_of_these_tests_is_one_to_torch_too(arrays, tmp_path):
    torch = pytest.importorskip("torch")
    arrays = {k: np.atleast_1d(v) for k, v in arrays.items()}
    path = written.tar_file(tmp_path / "old.tar", arrays)
    for name, value in torch.load(path, weights_only=False).items():
        np.testing.assert_array_equal(value.numpy(), arrays[name])


def test_files_are_read_without_torch(tmp_path):
    body = written.mapping({"w": written.tensor("0", 6, (3, 2), (1, 3))})
    contents = written.program(body), {"0": written.floats(6)}
    written.zip_file(tmp_path / "zip.pt", *contents)
    written.stream_file(tmp_path / "stream.pt", *contents)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from atebm_jax.convert import files\n"
        "for path in ('zip.pt', 'stream.pt'):\n"
        "    s = files.open_source(path)\n"
        "    print(s.read(s.tree['w']).tolist())"
    )
    made = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert made.stdout == "[[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]\n" * 2


def test_storage_view_of_old_files_is_read(tmp_path):
    view = b"(" + written.text("v") + written.number(2) + written.number(4) + b"t"
    body = written.mapping({"w": written.tensor("0", 8, (4,), (1,), tail=view)})
    path = written.stream_file(
        tmp_path / "w.pth", written.program(body), {"0": written.floats(8)}
    )
    np.testing.assert_array_equal(read_all(path)["w"], [2, 3, 4, 5])


def test_safetensors_are_read_with_bfloat16(arrays, tmp_path):
    pytest.importorskip("safetensors")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    from safetensors.numpy import save_file

    arrays["low"] = np.ones(3, ml_dtypes.bfloat16)
    save_file(arrays, tmp_path / "w.safetensors", metadata={"a": "b"})
    for suffix in (".safetensors", ".bin"):
        path = (tmp_path / "w.safetensors").rename(tmp_path / f"w{suffix}")
        source = files.open_source(path)
        assert source.metadata == {"a": "b"}
        for name, value in source.tree.items():
            np.testing.assert_array_equal(source.read(value), arrays[name])
        path.rename(tmp_path / "w.safetensors")


def test_fingerprint_is_that_of_the_bytes(tmp_path):
    path = written.zip_file(tmp_path / "w.pt", written.program(written.mapping({})))
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert files.open_source(path).sha256 == expected


def test_every_truncation_is_one_sentence(tmp_path):
    body = written.mapping({"w": written.tensor("0", 600, (600,), (1,))})
    for make in (written.zip_file, written.stream_file):
        whole = make(
            tmp_path / "w.pt", written.program(body), {"0": written.floats(600)}
        ).read_bytes()
        for fraction in (0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99, 0.9999):
            path = tmp_path / "cut.pt"
            path.write_bytes(whole[: int(len(whole) * fraction) or 1])
            with pytest.raises(UserError, match="truncated, damaged") as caught:
                source = files.open_source(path)
                source.read(source.tree["w"])
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_flipped_bits_in_a_zip_are_noticed(tmp_path):
    body = written.mapping({"w": written.tensor("0", 600, (600,), (1,))})
    path = written.zip_file(
        tmp_path / "w.pt", written.program(body), {"0": written.floats(600)}
    )
    data = bytearray(path.read_bytes())
    place = data.find(written.floats(600)) + 1000
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="truncated, damaged"):
        read_all(path)


def test_truncated_safetensors_are_refused(arrays, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file(arrays, tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    for size in (4, 20, len(data) - 8):
        (tmp_path / "cut.safetensors").write_bytes(data[:size])
        with pytest.raises(UserError, match="truncated, damaged"):
            files.open_source(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n <HTML><head>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b'{"error": "not found"}', "JSON"),
        (b"\x1f\x8b\x08\x00", "gunzip"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"hello, this is text\n", "no PyTorch checkpoint"),
        (bytes(1000), "no PyTorch checkpoint"),
        (b"\x80\x02]q\x00.", "no PyTorch checkpoint|holds no weights"),
        (pickle.dumps(np.ones(3)), "holds no weights.*found ndarray"),
    ],
)
def test_files_that_are_no_checkpoints_are_told_apart(content, message, tmp_path):
    from atebm_jax.convert import layouts

    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        layouts.find(files.open_source(path))
    assert "\n" not in str(caught.value)


def test_zip_of_something_else_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones(3))
    with pytest.raises(UserError, match=r"without data.pkl \(it holds npy\)"):
        files.open_source(tmp_path / "a.npz")


def test_torchscript_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    script = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    script.save(tmp_path / "s.pt")
    with pytest.raises(UserError, match="TorchScript"):
        files.open_source(tmp_path / "s.pt")


@pytest.mark.parametrize("what", ["missing.pt", "."])
def test_missing_file_and_folder_are_refused(what, tmp_path):
    with pytest.raises(UserError, match="does not exist|is a folder"):
        files.open_source(tmp_path / what)
