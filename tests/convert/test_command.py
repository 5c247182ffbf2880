"""The command: PyTorch networks in, the same function here, and back."""

import errno
import functools
import io
import json
import os
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
import reference
import tiny
import torch_networks
from etils import epath
from rich.console import Console

import atebm_jax
from atebm_jax import UserError, checkpoint, job, models, storage
from atebm_jax.convert import exporting, files, importing, names
from atebm_jax.convert.__main__ import main

MEAN, STD = (0.25, 0.5, 0.75), (0.125, 0.25, 0.5)


def run(*flags):
    """What the command prints."""
    printed = io.StringIO()
    main(list(flags), Console(file=printed, width=120))
    return printed.getvalue()


def wide_resnet(channels=3, activation="relu", depth=10):
    torch_networks.torch_and_timm()
    path = Path(__file__).parents[2] / "benchmarks" / "torch_reference.py"
    network = runpy.run_path(str(path))["WideResNet"](
        depth=depth,
        widen_factor=1,
        num_classes=10,
        channels=channels,
        activation=activation,
    )
    torch_networks.randomise(network)
    return network.eval()


def logits(network, images):
    torch, _ = torch_networks.torch_and_timm()
    with torch.no_grad():
        return network(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()


def save(state, path):
    torch, _ = torch_networks.torch_and_timm()
    torch.save(state, path)
    return str(path)


def assert_relative(actual, expected, tolerance=1e-5):
    scale = max(np.abs(expected).max(), 1)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


@pytest.fixture(scope="module")
def network():
    return wide_resnet()


@pytest.fixture(scope="module")
def imported(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    state = {"state_dict": network.state_dict(), "epoch": 3}
    file = save(state, folder / "w.pth")
    printed = run(f"--from={file}", f"--to={folder / 'made'}", "--normalization=none")
    return folder / "made", printed


@pytest.fixture
def uncompiled(monkeypatch):
    """Imports without the logits of the fixed image: compilation takes seconds."""
    monkeypatch.setattr(importing, "probe_logits", lambda *_: np.zeros(3))


def test_wide_resnet_computes_what_it_did(network, imported):
    folder, printed = imported
    model = atebm_jax.load(folder)
    images = np.random.default_rng(0).random((3, 32, 32, 3), np.float32)
    assert_relative(model.logits(images), logits(network, images))
    record = json.loads((folder / "import.json").read_text())
    fixed = importing.probe_image((32, 32, 3))[None]
    assert_relative(record["probe"]["logits"], logits(network, fixed)[0])
    assert f"{record['probe']['logits'][0]:.5f}" in printed
    assert record["sha256"] in printed and len(record["sha256"]) == 64
    assert record["source"] == "w.pth"
    assert record["arrays_matched"] == 39 and "all 39 arrays" in printed
    assert record["unwrapped"] == ["took the weights under 'state_dict'"]


def test_imported_network_samples(imported):
    made = atebm_jax.load(imported[0], batch_size=2).sample([3, 7], num_steps=2)
    assert made.shape == (2, 32, 32, 3) and np.isfinite(made).all()


@pytest.mark.parametrize(
    ("name", "side", "extra"),
    [
        ("resnet18", 64, {}),
        pytest.param("resnet50", 64, {}, marks=pytest.mark.slow),
        pytest.param("convnext_tiny_cvst", 64, {}, marks=pytest.mark.slow),
        pytest.param("convnext_tiny", 64, {}, marks=pytest.mark.slow),
        pytest.param("vit_small_patch16_224", 224, {}, marks=pytest.mark.slow),
    ],
)
def test_timms_network_comes_in_and_goes_back(name, side, extra, uncompiled, tmp_path):
    network = torch_networks.create(name, num_classes=7, **extra)
    wrapped = {
        "normalize.mean": np.float32(MEAN).reshape(1, 3, 1, 1),
        "normalize.std": np.float32(STD).reshape(1, 3, 1, 1),
    }
    torch, _ = torch_networks.torch_and_timm()
    state = {k: torch.tensor(v) for k, v in wrapped.items()}
    state |= {f"model.{k}": v for k, v in network.state_dict().items()}
    file = save(state, tmp_path / "w.pt")
    printed = run(f"--from={file}", f"--to={tmp_path / 'in'}", f"--image_size={side}")
    assert "took off the prefix 'model.'" in printed or "under 'model'" in printed
    model = atebm_jax.load(tmp_path / "in")
    images = np.random.default_rng(1).random((2, side, side, 3), np.float32)
    normalized = (images - np.float32(MEAN)) / np.float32(STD)
    assert_relative(model.logits(images), logits(network, normalized))

    file = tmp_path / "out.safetensors"
    run(f"--from={tmp_path / 'in'}", "--export=safetensors", f"--to={file}")
    from safetensors.torch import load_file

    twin = torch_networks.create(name, num_classes=7, **extra)
    twin.load_state_dict(load_file(file), strict=True)
    for key, value in network.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(twin.state_dict()[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("activation", ["relu", "swish"])
def test_export_and_import_give_the_same_bits(activation, uncompiled, tmp_path):
    pytest.importorskip("safetensors")
    theirs = wide_resnet(activation=activation)
    file = save(theirs.state_dict(), tmp_path / "w.pt")
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    exported = str(tmp_path / "w.safetensors")
    flags = ("--mean=0.25,0.5,0.75", "--std=0.125,0.25,0.5")
    run(f"--from={file}", f"--to={first}", f"--activation={activation}", *flags)
    run(f"--from={first}", "--export=safetensors", f"--to={exported}")
    run(f"--from={exported}", f"--to={second}")
    (a, meta_a), (b, meta_b) = map(checkpoint.load_weights, (first, second))
    for collection in ("params", "batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, a[collection], b[collection])
    assert meta_a["config"] == meta_b["config"]
    assert meta_b["config"]["model"]["activation"] == activation
    from safetensors.torch import load_file

    wide_resnet().load_state_dict(load_file(exported), strict=True)


def test_classes_are_named_by_a_file_and_stay_through_an_export(small, tmp_path):
    arrays, write = small
    names, listed = ["a cat", "a dog", "a bird"], tmp_path / "names"
    flags = (*write(arrays), "--normalization=none", f"--classes_file={listed}")
    for text, found in (("a\nb\n", "2 lines"), ("a\n" * 3, "'a' twice")):
        listed.write_text(text)
        with pytest.raises(UserError, match=f"{found}.*3 classes, one a line"):
            run(*flags)
    listed.write_text("\n".join(names) + "\n", encoding="utf-8-sig")
    run(*flags)
    exported = tmp_path / "again.safetensors"
    run(f"--from={tmp_path / 'out'}", "--export=safetensors", f"--to={exported}")
    run(f"--from={exported}", f"--to={tmp_path / 'second'}")
    for folder in ("out", "second"):
        meta = checkpoint.load_weights(tmp_path / folder)[1]
        assert meta["class_names"] == names


def test_stage_2_starts_from_imported_weights_of_the_same_function(small, tmp_path):
    _, write = small
    arrays = names.to_torch("wide_resnet", random_variables(1, num_classes=10))
    run(*write(arrays), "--mean=0.5", "--std=0.5", "--image_size=8")
    made = str(tmp_path / "out")
    model = {"model.name": "wide_resnet"}
    model |= {"model.mean": (0.5,), "model.std": (0.5,)}

    def start(**changes):
        settings = tiny.config(init_from=made, **(model | changes))
        network = models.build(settings.model)
        shapes = models.variable_shapes(network, settings.data.image_shape)
        origins = job._origins(settings, epath.Path(tmp_path), network, shapes, 100)
        return origins["stage2"]()

    weights, _ = checkpoint.load_weights(made)
    jax.tree.map(np.testing.assert_array_equal, start(), weights)
    others = {"mean": (0.25,), "std": (0.25,), "activation": "swish"}
    for field, value in others.items():
        with pytest.raises(UserError, match=rf"config.model.{field} is .*trained with"):
            start(**{f"model.{field}": value})
    settings = tiny.config(init_from=made, **{"model.name": "wide_resnet"})
    with pytest.raises(UserError, match="config.model.mean is .*trained with"):
        tiny.run(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def changed(network, **changes):
    """A state dict with arrays put in, or taken out by None."""
    state = dict(network.state_dict())
    for name, value in changes.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


def test_left_over_missing_and_misshapen_are_refused_by_name(network, tmp_path):
    torch, _ = torch_networks.torch_and_timm()
    cases = {
        r"left over: 1 \(head2.weight \(3, 3\)\)": {"head2.weight": torch.ones(3, 3)},
        r"missing: 1 \(block2.layer.0.bn2.bias \(32,\)\)": {
            "block2.layer.0.bn2.bias": None
        },
        r"block2.layer.0.conv2.weight \(32, 32, 1, 1\) instead of \(32, 32, 3, 3\)": {
            "block2.layer.0.conv2.weight": torch.ones(32, 32, 1, 1)
        },
    }
    for message, change in cases.items():
        file = save(changed(network, **change), tmp_path / "w.pt")
        with pytest.raises(UserError, match=message):
            run(f"--from={file}", f"--to={tmp_path / 'out'}")
        assert [p.name for p in tmp_path.iterdir()] == ["w.pt"]


def test_many_differences_are_counted_and_the_first_is_named(network, tmp_path):
    torch, _ = torch_networks.torch_and_timm()
    changes = {name: None for name in network.state_dict() if name.startswith("block3")}
    changes |= {f"head{k}.weight": torch.ones(3, k) for k in range(2, 40)}
    file = save(changed(network, **changes), tmp_path / "w.pt")
    message = (
        r"missing: 11 \(block3\S+ \(\d+,\), ...\); left over: 38 \(head2.weight \("
    )
    with pytest.raises(UserError, match=message) as caught:
        run(f"--from={file}", f"--to={tmp_path / 'out'}")
    assert len(str(caught.value)) < 300


def test_list_says_of_every_family_how_it_is_told_and_normalised():
    printed = io.StringIO()
    main(["--list"], Console(file=printed, width=1000))
    rows = printed.getvalue().split("├")
    for row, (family, torch, marks) in zip(rows, names.families(), strict=True):
        assert f"│ {family} " in row
        assert f"--arch: {' '.join(models.FAMILIES[family].archs)} " in row
        assert f"recognised by: {' or '.join(sorted(marks))} " in row
        assert torch.published and f"published: {torch.published} " in row
    wide = rows[list(models.FAMILIES).index("wide_resnet")]
    assert "input normalisation: give --normalization=none (TRADES" in wide
    vit = rows[list(models.FAMILIES).index("vit")]
    assert "\n" in vit and "vit_s_cvst: imagenet is assumed" in vit
    said = printed.getvalue().splitlines()[-1]
    assert said.startswith("Mean and std that a file holds are used")


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet50", "is a wide_resnet; leave --arch out"),
        ("wrn34_10", r"--arch=wrn34_10: other shapes: .* instead of"),
        ("resnet5", "unknown architecture 'resnet5'"),
    ],
)
def test_architecture_against_the_file_is_refused(network, arch, message, tmp_path):
    file = save(network.state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=message):
        run(f"--from={file}", f"--to={tmp_path / 'out'}", f"--arch={arch}")


@functools.cache
def random_variables(channels=3, num_classes=3):
    return reference.random_variables(
        models.wide_resnet.network(10, 1, num_classes=num_classes), (8, 8, channels)
    )


@pytest.fixture
def small(uncompiled, tmp_path):
    """A WideResNet's arrays, and what writes changed ones; nothing is compiled."""
    safetensors = pytest.importorskip("safetensors.numpy")

    def write(arrays):
        safetensors.save_file(arrays, tmp_path / "w.safetensors")
        return f"--from={tmp_path / 'w.safetensors'}", f"--to={tmp_path / 'out'}"

    return names.to_torch("wide_resnet", random_variables()), write


def test_normalisation_that_nobody_says_is_asked_for_by_who_has_which(small, tmp_path):
    arrays, write = small
    with pytest.raises(UserError, match=r"none \(TRADES.*cifar10 \(DAT, RATIO"):
        run(*write(arrays))
    assert not (tmp_path / "out").exists()


def test_file_that_says_it_does_not_normalise_is_believed(small, tmp_path):
    arrays, write = small
    flags = write(arrays | {"normalize_input": np.array(False)})
    with pytest.raises(UserError, match="the file itself.*normalize_input is False"):
        run(*flags, "--normalization=cifar10")
    printed = run(*flags)
    assert "input normalisation: none (the file: normalize_input is False)" in printed
    assert "ASSUMED input normalisation" not in printed


def test_network_that_makes_no_numbers_is_not_written(small, tmp_path, monkeypatch):
    arrays, write = small
    monkeypatch.setattr(importing, "probe_logits", lambda *_: np.array([1, np.nan]))
    with pytest.raises(UserError, match="makes NaN or Inf of an image"):
        run(*write(arrays), "--mean=0.5,0.5,0.5", "--std=1e-46,1e-46,1e-46")
    assert not (tmp_path / "out").exists()


def test_what_is_assumed_stands_on_a_line_of_its_own(small, tmp_path):
    arrays, write = small
    printed = run(*write(arrays), "--normalization=none")
    lines = [x for x in printed.splitlines() if x.startswith("ASSUMED ")]
    assert len(lines) == 1 and lines[0].startswith("ASSUMED activation: relu")
    record = json.loads((tmp_path / "out" / "import.json").read_text())
    assert [f"ASSUMED {said}" for said in record["assumed"]] == lines


@pytest.mark.parametrize(
    ("asked", "activation"), [("silu", "swish"), ("swish", "swish"), ("gelu", "gelu")]
)
def test_activation_that_is_given_is_not_assumed(asked, activation, small, tmp_path):
    arrays, write = small
    flags = ("--normalization=none", f"--activation={asked}")
    assert "ASSUMED" not in run(*write(arrays), *flags)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model"]["activation"] == activation


@pytest.mark.parametrize("family", ["convnext", "vit"])
def test_activation_of_a_family_with_one_is_refused_if_another(family):
    source = files.Source("w.pt", "", {}, np.asarray, {})
    with pytest.raises(UserError, match=f"--activation=relu: a {family} has gelu"):
        importing._unsaid(source, family, {}, "resnet50", "relu")
    for asked in (None, "gelu"):
        found = importing._unsaid(source, family, {}, "resnet50", asked)
        assert found == ({"activation": "relu"}, [])


def test_second_first_group_of_trades_is_dropped_with_a_printed_step(small):
    arrays, write = small
    for name in [n for n in arrays if n.startswith("block1.")]:
        arrays[f"sub_{name}"] = arrays[name] + 1
    printed = run(*write(arrays), "--normalization=none")
    assert "dropped 10 arrays under 'sub_block1.'" in printed


def test_entry_to_give_is_proposed_where_the_weights_do_not_fit(small):
    arrays, write = small
    other = {f"ema.{name}": x for name, x in arrays.items()}
    del other["ema.bn1.bias"]
    with pytest.raises(UserError, match="missing: 1 .bn1.bias.*--entry=model"):
        run(*write(other | {f"model.{n}": x for n, x in arrays.items()}))


def test_normalisation_is_recorded_with_its_origin(small, tmp_path):
    plain, write = small
    with_mean = plain | {"mean": np.float32(MEAN), "std": np.float32(STD)}
    cases = [
        (plain, ["--normalization=cifar10"], (0.4914, 0.4822, 0.4465), "--normal"),
        (plain, ["--normalization=imagenet"], (0.485, 0.456, 0.406), "--normal"),
        (plain, ["--normalization=none"], (), "--normal"),
        (plain, ["--mean=0.5", "--std=0.5"], (0.5,) * 3, "--mean"),
        (with_mean, [], MEAN, "the file"),
    ]
    for index, (state, flags, mean, origin) in enumerate(cases):
        folder = tmp_path / f"out{index}"
        run(write(state)[0], f"--to={folder}", *flags)
        record = json.loads((folder / "import.json").read_text())["normalization"]
        assert record["mean"] == pytest.approx(list(mean), abs=1e-4)
        assert origin in record["origin"]
        assert record["inside_the_network"] == bool(mean)
        config = json.loads((folder / "config.json").read_text())
        assert config["model"]["mean"] == record["mean"]
    with pytest.raises(UserError, match="the file itself has mean"):
        run(*write(with_mean), "--normalization=none")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--normalization=cifar"], "unknown --normalization 'cifar'"),
        (["--mean=0.5"], "go together"),
        (["--mean=0.5,0.5", "--std=0.5"], "as many numbers"),
        (["--mean=123,116,103", "--std=1,1,1"], r"in \[0, 1\]"),
        (["--mean=x", "--std=1"], "--mean=x"),
        (["--mean=0.5,0.5", "--std=0.5,0.5"], "3 channels"),
        (["--normalization=none", "--mean=0"], "exclude each other"),
        (["--image_size=0"], "positive"),
        (["--image_size=100000"], "4096 pixels at most"),
        (["--activation=tanh"], "activation"),
        (["--export=onnx"], "unknown --export 'onnx'"),
    ],
)
def test_flags_that_make_no_sense_are_refused(network, flags, message, tmp_path):
    file = save(network.state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=message):
        run(f"--from={file}", f"--to={tmp_path / 'out'}", *flags)
    assert [p.name for p in tmp_path.iterdir()] == ["w.pt"]


def test_what_is_there_is_not_overwritten(small, tmp_path):
    arrays, write = small
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    source, to = write(arrays)
    with pytest.raises(UserError, match="is not empty"):
        run(source, f"--to={tmp_path / 'full'}")
    with pytest.raises(UserError, match="is there already"):
        run(source, "--export=safetensors", f"--to={tmp_path / 'w.safetensors'}")
    (tmp_path / "out").mkdir()
    run(source, to, "--normalization=none")
    assert atebm_jax.load(tmp_path / "out").num_classes == 3


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        # Tensorstore and safetensors give a text alone.
        ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']"),
    ],
)
def test_nothing_half_written_stays(error, tmp_path, monkeypatch):
    made = importing.Imported({"params": {"a": np.ones(1)}}, None, [], {})

    def fail(folder, *_):
        (folder / "begun").touch()
        raise error

    monkeypatch.setattr(importing, "_save_weights", fail)
    monkeypatch.setattr(checkpoint, "as_json", lambda _: {})
    with pytest.raises(UserError, match=r"--to=.*out cannot be written \(No space"):
        importing.write(made, tmp_path / "deep" / "er" / "out")
    assert not list(tmp_path.iterdir())


def test_full_disk_is_told_and_leaves_nothing_behind(mounted, uncompiled, tmp_path):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    arrays = names.to_torch("wide_resnet", random_variables(1))
    save_file(arrays, tmp_path / "w.safetensors")
    folder, remount = mounted
    remount("size=200k")
    flags = [f"--from={tmp_path / 'w.safetensors'}", "--image_size=8"]
    flags += ["--normalization=none"]
    message = r"cannot be written \(No space left on device\): nothing is left"
    with pytest.raises(UserError, match=message):
        run(*flags, f"--to={folder / 'new' / 'in'}")
    assert not list(folder.iterdir())
    run(*flags, f"--to={tmp_path / 'in'}")
    flags = [f"--from={tmp_path / 'in'}", "--export=safetensors"]
    with pytest.raises(UserError, match=message):
        run(*flags, f"--to={folder / 'new' / 'w.safetensors'}")
    assert not list(folder.iterdir())
    remount("size=9m")
    run(*flags, f"--to={folder / 'new' / 'w.safetensors'}")
    assert [path.name for path in folder.rglob("*")] == ["new", "w.safetensors"]


def test_devices_stay_and_links_are_followed(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "folder").mkdir()
    message = "--to=.*pipe is neither a file nor a folder"
    with (
        pytest.raises(UserError, match=message),
        storage.appears_whole(tmp_path / "pipe"),
    ):
        raise AssertionError("work")
    for kind in ("--export=safetensors", "--normalization=none"):
        for device in (tmp_path / "pipe", "/dev/null"):
            with pytest.raises(UserError, match="--to=.* is (there|no folder)"):
                run(f"--from={tmp_path / 'nowhere'}", f"--to={device}", kind)
    assert (tmp_path / "pipe").is_fifo() and Path("/dev/null").is_char_device()
    with storage.appears_whole(tmp_path / "link") as made:
        Path(made).mkdir()
        (Path(made) / "weights").touch()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder/weights").exists()
    with pytest.raises(UserError, match="--from=/dev/null is no file"):
        run("--from=/dev/null", f"--to={tmp_path / 'new'}")


@pytest.mark.parametrize("kind", ["--export=safetensors", "--normalization=none"])
def test_results_go_to_a_local_place_that_is_named(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    for to, message in (("gs://x/y", "gs://x/y is in a cloud"), ("", "--to is empty")):
        with pytest.raises(UserError, match=message):
            run("--from=nowhere", f"--to={to}", kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["file/below", "x" * 300])
def test_place_that_cannot_be_made_is_told(name, tmp_path):
    made = importing.Imported({"params": {}}, tiny.config(), [], {})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="--to=.* cannot be written"):
        importing.write(made, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_verbose_lists_every_parameter(small):
    arrays, write = small
    counted = arrays | {"bn1.num_batches_tracked": np.array(3)}
    printed = run(*write(counted), "--normalization=none", "--verbose")
    for name in counted:
        assert (name in printed) == (not name.endswith("num_batches_tracked"))


def test_mistakes_end_with_one_sentence_and_exit_code_2(monkeypatch, capsys, tmp_path):
    nothing = ["--from=nothing.pt", f"--to={tmp_path / 'x'}"]
    for flags in ([], ["--to=x"], ["--from=x"], nothing, ["--x"]):
        monkeypatch.setattr("sys.argv", ["convert", *flags])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(main.__code__.co_filename, run_name="__main__")
        assert caught.value.code == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1


def test_export_of_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        exporting.export(str(tmp_path), str(tmp_path / "w.safetensors"))
