"""The sample command: what it writes, that images keep their identity, mistakes."""

import io
import json
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import tiny
from PIL import Image
from rich.console import Console

from atebm_jax import UserError, checksums, drawing, workdir_lock
from atebm_jax.sample import __main__ as command


def draw(workdir, out, *more):
    command.main([f"--workdir={workdir}", f"--out={out}", *more])
    with np.load(out / "samples.npz") as stored:
        return dict(stored)


def test_command_writes_pictures_grid_arrays_and_protocol(workdir, tmp_path):
    stored = draw(workdir, tmp_path, "--classes=3,7", "--count=5")
    assert stored["arr_0"].shape == (5, 8, 8, 1) and stored["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(stored["arr_1"], [3, 7, 3, 7, 3])
    names = {path.name for path in tmp_path.iterdir()}
    pictures = {f"{i:06d}_class{(3, 7)[i % 2]}.png" for i in range(5)}
    assert names == pictures | {"grid.png", "samples.npz", "samples.json"}
    picture = np.asarray(Image.open(tmp_path / "000003_class7.png"))
    np.testing.assert_array_equal(picture, stored["arr_0"][3, ..., 0])
    protocol = json.loads((tmp_path / "samples.json").read_text())
    assert protocol["num_steps"] == 3 and protocol["classes"] == [3, 7]


@pytest.mark.parametrize("name", ["[bold]a", "[/x]"])
def test_folder_is_named_as_it_is(workdir, tmp_path, name):
    printed = io.StringIO()
    console = Console(file=printed, width=300, force_terminal=True)
    out = tmp_path / name
    command.main([f"--workdir={workdir}", f"--out={out}", "--count=1"], console)
    assert f"1 sample is in {out}" in printed.getvalue()


def test_classes_are_those_of_the_checkpoint(workdir, tmp_path, caplog):
    named = tmp_path / "named"
    shutil.copytree(workdir, named)
    for meta in named.rglob("meta/metadata"):
        names = [*"zyxwvutsr", "two"]
        content = json.loads(meta.read_text())
        meta.write_text(json.dumps(content | {"class_names": names}))
        (meta.parents[1] / checksums.FILE).unlink()
    stored = draw(named, tmp_path / "a", "--classes=two,z", "--count=2")
    np.testing.assert_array_equal(stored["arr_1"], [9, 0])
    for meta in named.rglob("meta/metadata"):
        content = json.loads(meta.read_text())
        meta.write_text(json.dumps(content | {"class_names": None}))
    stored = draw(named, tmp_path / "b", "--classes=3", "--count=1")
    assert "does not name its classes" in caplog.text


def test_more_samples_begin_with_the_same(workdir, tmp_path):
    few = draw(workdir, tmp_path / "few", "--count=10")["arr_0"]
    many = draw(workdir, tmp_path / "many", "--count=70")["arr_0"]
    np.testing.assert_array_equal(many[:10], few)
    # Going on with a larger count draws only what is missing.
    old = (tmp_path / "few" / "000002_class2.png").stat().st_mtime_ns
    more = draw(workdir, tmp_path / "few", "--count=40")["arr_0"]
    np.testing.assert_array_equal(more, many[:40])
    assert (tmp_path / "few" / "000002_class2.png").stat().st_mtime_ns >= old


def test_devices_draw_the_same_bits(workdir, tmp_path):
    """Two of eight devices here, and the one of another process."""
    flags = ["--count=100", "--sampler=sgld", "--step_size=1", "--num_steps=9"]
    here = draw(workdir, tmp_path / "two", *flags)["arr_0"]
    arguments = [f"--workdir={workdir}", f"--out={tmp_path / 'one'}", *flags]
    done = subprocess.run(
        tiny.command("atebm_jax.sample", *arguments),
        check=False,
        capture_output=True,
        text=True,
        env=tiny.environment(),
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "one" / "samples.npz") as stored:
        np.testing.assert_array_equal(stored["arr_0"], here)


def test_seeds_can_be_a_data_set(workdir, tmp_path):
    from atebm_jax import data

    stored = draw(
        workdir, tmp_path, "--seeds=digits:test", "--num_steps=0", "--unconditional"
    )
    source = data.open_source("digits:test")
    images, _ = data.materialise(source, "", (8, 8, 1))
    np.testing.assert_array_equal(stored["arr_0"], images[:64])
    assert "arr_1" not in stored


def test_seed_that_cannot_be_decoded_gives_way_to_the_next(workdir, tmp_path, capsys):
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    levels = {"a": 40, "c": 200}
    for name, level in levels.items():
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(seeds / f"{name}.png")
    (seeds / "b.png").write_text("no image")
    arguments = [f"--seeds=folder:{seeds}", "--num_steps=0", "--count=4"]
    stored = draw(workdir, tmp_path / "out", *arguments)
    np.testing.assert_array_equal(stored["arr_0"][:, 0, 0, 0], [40, 200, 200, 40])
    assert "the next one instead: 1" in capsys.readouterr().out
    protocol = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert protocol["undecodable_seeds"][:2] == [1, 4]


def test_damaged_files_are_named(workdir, tmp_path):
    draw(workdir, tmp_path, "--count=3")
    picture = tmp_path / "000001_class1.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:60])
    with pytest.raises(UserError, match="000001_class1.png is damaged.*delete it"):
        draw(workdir, tmp_path, "--count=3")
    picture.unlink()
    draw(workdir, tmp_path, "--count=3")
    assert picture.read_bytes() == whole
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(UserError, match="samples.json is damaged"):
        draw(workdir, tmp_path, "--count=3")


def test_killed_command_goes_on_to_the_same_files(workdir, tmp_path):
    """SIGKILL after the first chunks, against a run that nobody disturbs."""
    flags = (f"--workdir={workdir}", f"--out={tmp_path / 'killed'}", "--count=1000")
    process = subprocess.Popen(
        tiny.command("atebm_jax.sample", *flags),
        env=tiny.environment(),
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None:
        if len(list((tmp_path / "killed").glob("0*.png"))) > 40:
            process.kill()
        time.sleep(0.01)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "samples.npz").exists()
    for out in ("killed", "whole"):
        draw(workdir, tmp_path / out, "--count=1000")
    killed, whole = (
        {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}
        for out in ("killed", "whole")
    )
    assert killed == whole


def test_other_settings_do_not_mix_in_one_folder(workdir, tmp_path):
    draw(workdir, tmp_path, "--count=2")
    with pytest.raises(UserError, match="samples with num_steps 3 and now it is 4"):
        draw(workdir, tmp_path, "--count=2", "--num_steps=4")


def test_settings_of_the_sampler_reach_images_and_protocol(workdir, tmp_path):
    flags = ["--count=2", "--step_size=0.25"]
    drawn = {
        noise: draw(
            workdir, tmp_path / noise, *flags, f"--sampler=sgld(noise={noise})"
        )["arr_0"]
        for noise in ("0.01", "0.2")
    }
    assert not np.array_equal(*drawn.values())
    protocol = json.loads((tmp_path / "0.01" / "samples.json").read_text())
    assert protocol["sampler"] == "sgld(noise=0.01)"
    # The same sampler in other words goes on; another one does not.
    draw(workdir, tmp_path / "0.01", *flags, "--sampler=sgld")
    with pytest.raises(UserError, match=r"sampler 'sgld\(noise=0.01\)' and now it is"):
        draw(workdir, tmp_path / "0.01", *flags, "--sampler=sgld(noise=0.005)")


def folder_of(folder, levels):
    """Grey images of these levels, each file of one size."""
    folder.mkdir(exist_ok=True)
    for number, level in enumerate(levels):
        path = folder / f"{number}.pgm"
        path.write_bytes(b"P5 8 8 255 " + bytes([level]) * 64)
    return folder


def test_seeds_that_have_changed_do_not_mix_in_one_folder(workdir, tmp_path):
    seeds, out = folder_of(tmp_path / "seeds", (40, 200)), tmp_path / "out"
    arguments = [f"--seeds=folder:{seeds}", "--num_steps=0"]
    few = draw(workdir, out, *arguments, "--count=2")["arr_0"]
    folder_of(seeds, (200, 40))
    with pytest.raises(UserError, match="not the same ones.*give another --out"):
        draw(workdir, out, *arguments, "--count=4")
    folder_of(seeds, (40, 200, 90))
    with pytest.raises(UserError, match="2 images then, 3 now"):
        draw(workdir, out, *arguments, "--count=4")
    (seeds / "2.pgm").unlink()
    more = draw(workdir, out, *arguments, "--count=4")["arr_0"]
    np.testing.assert_array_equal(more[:2], few)
    # What an earlier version wrote does not say of which images it was.
    protocol = json.loads((out / "samples.json").read_text())
    assert protocol.pop("seeds_data")["num_images"] == 2
    (out / "samples.json").write_text(json.dumps(protocol))
    folder_of(seeds, (1, 2, 3))
    draw(workdir, out, *arguments, "--count=4")
    assert "seeds_data" in json.loads((out / "samples.json").read_text())


def test_one_command_draws_into_a_folder_at_a_time(workdir, tmp_path):
    with workdir_lock.held(tmp_path, "--out"):
        with pytest.raises(UserError, match="in use by another job.*another --out"):
            draw(workdir, tmp_path, "--count=1")
        assert [path.name for path in tmp_path.iterdir()] == [workdir_lock.FILE]
    # What one that was killed has left keeps nobody out.
    (tmp_path / workdir_lock.FILE).write_text('{"pid": 1}')
    draw(workdir, tmp_path, "--count=1")


def test_protocol_without_images_is_no_obstacle(workdir, tmp_path):
    def none(*arguments):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(drawing, "draw", none)
        draw(workdir, tmp_path, "--count=2", "--num_steps=4")
    assert [path.name for path in tmp_path.iterdir()] == ["samples.json"]
    assert len(draw(workdir, tmp_path, "--count=2")["arr_0"]) == 2


def test_samples_that_are_no_numbers_are_not_drawn(workdir, tmp_path, monkeypatch):
    broken = [(0, np.full((32, 8, 8, 1), np.nan, np.float32))]
    monkeypatch.setattr(drawing, "draw", lambda *arguments: iter(broken))
    with pytest.raises(UserError, match="not finite numbers: the network has diverged"):
        draw(workdir, tmp_path, "--count=2")
    assert not list(tmp_path.glob("*.png"))


def test_full_disk_at_the_end_is_told(workdir, tmp_path, monkeypatch):
    def full(*arguments, **arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match="No space left.*the same command goes on"):
        draw(workdir, tmp_path, "--count=2")
    monkeypatch.undo()
    assert len(draw(workdir, tmp_path, "--count=2")["arr_0"]) == 2
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".npy")]


def test_seeds_of_another_size_leave_nothing_behind(workdir, tmp_path):
    (tmp_path / "seeds").mkdir()
    Image.new("L", (3, 5)).save(tmp_path / "seeds" / "x.png")
    with pytest.raises(UserError, match="has the shape"):
        draw(workdir, tmp_path / "out", f"--seeds=folder:{tmp_path / 'seeds'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes=10"], "from 0 to 9"),
        (["--classes=cat"], "from 0 to 9"),
        (["--classes=1", "--unconditional"], "exclude each other"),
        (["--count=0"], "--count is 0"),
        (["--count=1000000000000"], "expected 1 to 1000000 images"),
        (["--step_size=1e39"], "positive"),
        (["--sampler=hmc"], "unknown sampler 'hmc'"),
        (["--sampler=sgld(nois=1)"], "no setting 'nois'.*sgld.noise=0.01"),
        (["--sampler=sgld(noise=-1)"], "noise is -1.0: it must be finite"),
        (["--schedule=step"], "unknown schedule 'step'"),
        (["--step_size=0"], "positive"),
        (["--num_steps=-1"], "must not be negative"),
        (["--num_steps=3000000000"], "below 2"),
        (["--smooth=-1"], "smooth is -1"),
        (["--smooth=65"], "0 to 64 pixels"),
        (["--seed=-1"], "seed is -1"),
        (["--seed=4294967296"], "seed is 4294967296"),
        (["--quantise=up"], "unknown --quantise 'up'"),
        (["--seeds=folder:/nowhere"], "nowhere"),
        (["--out=gs://x/y"], "--out=gs://x/y is in a cloud"),
        (["--out="], "--out is empty"),
        (["--workdir=/nowhere"], "no checkpoint at /nowhere"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    workdir, tmp_path, arguments, message
):
    with pytest.raises(UserError, match=message):
        draw(workdir, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_unknown_flag_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--class=3"])
    assert stopped.value.code == 2
    assert "--help" in capsys.readouterr().err


def test_other_seeds_and_steps_need_no_compilation(workdir):
    import atebm_jax

    model = atebm_jax.load(workdir)
    model.sample(count=1, num_steps=1, target_energy=0.0)
    before = drawing.chunk_program.cache_info().misses
    for seed in range(3):
        model.sample(
            count=1,
            seed=seed,
            num_steps=seed,
            step_size=0.1 + seed,
            target_energy=float(seed),
        )
    assert drawing.chunk_program.cache_info().misses == before
