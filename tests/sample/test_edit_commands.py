"""explain and edit: what they write, that results keep their identity, mistakes."""

import json

import numpy as np
import pytest
from PIL import Image

from atebm_jax import (
    UserError,
    constraints,
    data,
    editing,
    pictures,
    trained,
    workdir_lock,
)
from atebm_jax.sample import __main__ as command
from atebm_jax.sample import draw


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The first digits as PNG files, and a mask of their lower half."""
    masks = tmp_path_factory.mktemp("files")
    folder = masks / "digits"
    folder.mkdir()
    images, _ = data.materialise(data.open_source("digits:test"), "", (8, 8, 1))
    for number in range(6):
        Image.fromarray(images[number, ..., 0]).save(folder / f"{number}.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[4:] = 255
    Image.fromarray(mask).save(masks / "lower.png")
    Image.fromarray(mask * 0).save(masks / "none.png")
    return folder


@pytest.fixture
def plain(monkeypatch):
    """Strips cost more than what they show, and are empty here."""
    monkeypatch.setattr(pictures, "strip", lambda path, *rest: path.touch())


@pytest.fixture(scope="module")
def loaded(workdir):
    return trained.load(workdir)


def run(name, workdir, out, *more):
    command.main([name, *map(str, more), f"--workdir={workdir}", f"--out={out}"])
    return json.loads((out / f"{name}.json").read_text())


def pixels(path):
    return np.asarray(Image.open(path))


def test_edits_take_the_sampler_that_the_config_s_steps_are_of(loaded):
    settings = loaded.config.evaluate.samples.copy_and_resolve_references()
    settings.sampler, settings.step_size = "sgld(noise=0.005)", 0.001
    images = np.full((2, 8, 8, 1), 0.5, np.float32)
    hole = np.ones((8, 8), bool)
    for constraint, sampler, size in (
        (constraints.inpaint(images, hole), "sgld(noise=0.005)", 0.001),
        # A ball is crossed in five steps of PGD, whatever SGLD's factor is.
        (constraints.ball(images, 2.0), "pgd", 0.4),
        (constraints.ball(images, 0.1, "linf"), "sign", 0.02),
    ):
        rows, recipe = editing.prepare(constraint, None, settings)
        assert recipe.sampler == sampler
        np.testing.assert_allclose(rows.step_sizes, size, rtol=1e-6)
    rows, recipe = editing.prepare(
        constraints.ball(images, 2.0), None, settings, sampler="sgld"
    )
    assert recipe.sampler == "sgld(noise=0.01)"
    np.testing.assert_allclose(rows.step_sizes, 0.001, rtol=1e-6)


def test_explain_writes_strip_results_and_json(workdir, digits, tmp_path):
    report = run(
        "explain", workdir, tmp_path, digits / "5.png", "--target=3,8", "--radius=0.5,1"
    )
    results = {f"5_target{k}_radius{r}.png" for k in (3, 8) for r in ("0.5", "1")}
    assert {p.name for p in tmp_path.iterdir()} == results | {
        "5_strip.png",
        "explain.json",
    }
    assert report["num_steps"] == 3 and len(report["results"]) == 4
    original = pixels(digits / "5.png") / 255
    for result in report["results"]:
        changed = pixels(tmp_path / result["files"]["result"]) / 255
        length = np.linalg.norm(changed - original)
        # Bytes are rounded: 64 pixels by at most half a level.
        assert length == pytest.approx(result["distance"]["l2"], abs=8 / 510)
        assert result["distance"]["l2"] <= result["radius"] * (1 + 1e-5)
        path, target = result["path"], result["target"]["class"]
        assert len(path["target_confidence"]) == len(path["energy"]) == 4
        confidence = result["target_confidence"]
        assert confidence["before"] == path["target_confidence"][0]
        assert confidence["after"] == path["target_confidence"][-1]
        assert result["reached"] == (path["predicted"][-1] == target)
        assert result["original"]["class"] == path["predicted"][0]
        assert result["energy"]["after"] < result["energy"]["before"]
    width, height = Image.open(tmp_path / "5_strip.png").size
    assert width > 1000 and height > 1000


def test_explanation_of_an_image_does_not_depend_on_those_beside_it(
    workdir, digits, tmp_path, plain
):
    # Forty results do not fit into one chunk.
    flags = ["--target=all", "--radius=1"]
    run("explain", workdir, tmp_path / "many", digits, "--index=2:6", *flags)
    run("explain", workdir, tmp_path / "one", digits / "5.png", *flags)
    for path in (tmp_path / "one").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes()
    many, one = (
        json.loads((tmp_path / name / "explain.json").read_text())["results"]
        for name in ("many", "one")
    )
    assert len(many) == 40 and len(one) == 10
    # The pictures are the same bit by bit. Numbers are to rounding: on some processors
    # XLA multiplies the last rows of a chunk by another kernel than the first ones.
    for there, here in zip(many[30:], one, strict=True):
        assert_close(there, here)


def assert_close(there, here):
    if isinstance(here, dict):
        assert there.keys() == here.keys()
        for key in here:
            assert_close(there[key], here[key])
    elif isinstance(here, list):
        assert len(there) == len(here)
        for pair in zip(there, here, strict=True):
            assert_close(*pair)
    elif isinstance(here, float):
        assert there == pytest.approx(here, rel=1e-4, abs=1e-5)
    else:
        assert there == here


def test_data_sets_are_named_by_place_and_know_their_labels(
    workdir, digits, tmp_path, plain
):
    flags = ["--target=3", "--radius=1"]
    by_spec = run(
        "explain", workdir, tmp_path / "a", "digits:test", "--index=5", *flags
    )
    by_file = run("explain", workdir, tmp_path / "b", digits / "5.png", *flags)
    (first,), (second,) = by_spec["results"], by_file["results"]
    assert first["image"] == "digits_test_000005" and first["label"]["class"] in range(
        10
    )
    assert second["label"] is None
    assert first["path"] == second["path"] and first["sha256"] == second["sha256"]


def test_stopped_command_makes_only_what_is_missing(
    workdir, digits, tmp_path, plain, monkeypatch
):
    arguments = [digits, "--index=0:5", "--target=1", "--radius=0.5"]
    expected = run("explain", workdir, tmp_path / "whole", *arguments)
    out, written, write = tmp_path / "cut", [], pictures.strip

    def stop_at_the_third(path, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pictures, "strip", stop_at_the_third)
        run("explain", workdir, out, *arguments)
    assert json.loads((out / "explain.json").read_text()).get("results") is None
    old = (out / written[0]).stat().st_mtime_ns
    assert run("explain", workdir, out, *arguments) == expected
    assert (out / written[0]).stat().st_mtime_ns == old
    # Another image joins those that are there; a finished command computes nothing.
    with monkeypatch.context() as patch:
        patch.setattr(editing, "edit_chunks", lambda *a: pytest.fail("computed again"))
        assert run("explain", workdir, out, *arguments) == expected
    more = run("explain", workdir, out, digits / "5.png", *arguments[2:])
    assert more["results"][:5] == expected["results"] and len(more["results"]) == 6
    (out / "3_strip.png").unlink()
    again = run("explain", workdir, out, *arguments)
    assert again == more and (out / "3_strip.png").exists()


def test_image_that_changed_is_explained_again(workdir, digits, tmp_path, plain):
    image = tmp_path / "x.png"
    for number in (1, 2):
        Image.fromarray(pixels(digits / f"{number}.png")).save(image)
        report = run(
            "explain", workdir, tmp_path / "out", image, "--target=1", "--radius=0.5"
        )
    expected = run(
        "explain",
        workdir,
        tmp_path / "b",
        digits / "2.png",
        "--target=1",
        "--radius=0.5",
    )
    (result,), (other,) = report["results"], expected["results"]
    assert result["path"] == other["path"]


def test_other_settings_do_not_mix_in_one_folder(workdir, digits, tmp_path, plain):
    run("explain", workdir, tmp_path, digits / "0.png", "--target=1")
    with pytest.raises(
        UserError, match="holds results with num_steps 3 and now it is 2"
    ):
        arguments = [digits / "0.png", "--target=1", "--num_steps=2"]
        run("explain", workdir, tmp_path, *arguments)


def test_inpainting_keeps_what_lies_outside_of_the_hole(workdir, digits, tmp_path):
    report = run(
        "edit",
        workdir,
        tmp_path,
        digits / "1.png",
        "--task=inpaint",
        f"--mask={digits}/../lower.png",
        f"--reference={digits}/1.png",
        "--target=guess",
    )
    made, true = pixels(tmp_path / "1_inpaint.png"), pixels(digits / "1.png")
    np.testing.assert_array_equal(made[:4], true[:4])
    (result,) = report["results"]
    assert result["energy"]["after"] < result["energy"]["before"]
    # Half of the pixels have no error: as much again in the other half.
    psnr = result["psnr"]
    assert psnr["result"] - psnr["result_in_hole"] == pytest.approx(3.0103, abs=1e-3)
    error = np.mean((made[4:] / 255 - true[4:] / 255) ** 2)
    assert psnr["result_in_hole"] == pytest.approx(-10 * np.log10(error), abs=0.2)
    assert {p.name for p in tmp_path.iterdir()} == {
        "1_inpaint.png",
        "1_strip.png",
        "edit.json",
    }


def test_translation_is_a_counterfactual(workdir, digits, tmp_path, plain):
    edited = run(
        "edit",
        workdir,
        tmp_path / "a",
        digits / "1.png",
        "--task=translate",
        "--target=3",
        "--radius=1",
    )
    explained = run(
        "explain", workdir, tmp_path / "b", digits / "1.png", "--target=3", "--radius=1"
    )
    assert edited["results"][0]["path"] == explained["results"][0]["path"]


def test_super_resolution_keeps_the_averages(workdir, digits, tmp_path, plain):
    small = np.asarray(Image.open(digits / "2.png").reduce(2), np.float32)
    Image.fromarray(small.astype(np.uint8)).save(tmp_path / "small.png")
    run(
        "edit",
        workdir,
        tmp_path / "out",
        tmp_path / "small.png",
        "--task=superres",
        "--factor=2",
    )
    made = pixels(tmp_path / "out" / "small_superres.png").astype(np.float32)
    means = made.reshape(4, 2, 4, 2).mean((1, 3))
    np.testing.assert_allclose(means, small, atol=0.5)


def test_degraded_images_are_compared_with_themselves(workdir, digits, tmp_path, plain):
    flags = ["--task=denoise", "--sigma=0.1", "--degrade"]
    many = run("edit", workdir, tmp_path / "a", digits, "--index=0:3", *flags)
    one = run("edit", workdir, tmp_path / "b", digits / "1.png", *flags)
    # Its noise belongs to the image.
    assert many["results"][1] == one["results"][0]
    for result in many["results"]:
        assert 15 < result["psnr"]["start"] < 27
        assert result["distance"]["l2"] <= 0.5 * 0.1 * 8 * (1 + 1e-5)
    small = run(
        "edit",
        workdir,
        tmp_path / "c",
        "digits:test",
        "--index=0",
        "--task=superres",
        "--factor=2",
        "--degrade",
    )
    assert (
        "truth" not in small["results"][0] and small["results"][0]["psnr"]["start"] > 5
    )


@pytest.mark.parametrize(
    "arguments",
    [["explain", "--target=1"], ["edit", "--task=denoise", "--sigma=1"]],
)
def test_results_go_to_a_local_folder_that_is_named(
    workdir, loaded, digits, tmp_path, monkeypatch, arguments
):
    monkeypatch.setattr(trained, "load", lambda *a, **k: loaded)
    monkeypatch.chdir(tmp_path)
    given = (arguments[0], workdir), (f"{digits}/0.png", *arguments[1:])
    with pytest.raises(UserError, match="--out=gs://x/y is in a cloud"):
        run(*given[0], "gs://x/y", *given[1])
    with pytest.raises(UserError, match="--out is empty"):
        run(*given[0], "", *given[1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "nowhere.png", "--target=1"], "no image 'nowhere.png'"),
        (["explain", "{d}/0.png", "{d}/0.png", "--target=1"], "named twice"),
        (["explain", "digits:test", "--target=1"], "choose some, --index=0,5,10:20"),
        (["explain", "digits:test", "--index=400", "--target=1"], "from 0 to 358"),
        (["explain", "digits:test", "--index=3:1", "--target=1"], "--index=3:1"),
        (["explain", "digits:tset", "--index=1", "--target=1"], "no split 'tset'"),
        (["explain", "{d}/0.png", "--target=10"], "--target=10: expected numbers from"),
        (["explain", "{d}/0.png", "--target=cat"], "names of classes"),
        (["explain", "{d}/0.png", "--target=1", "--radius=0"], "--radius=0: expected"),
        (["explain", "{d}/0.png", "--target=1", "--radius=near"], "positive numbers"),
        (["explain", "{d}/0.png", "--target=1", "--norm=l1"], "choose one of l2, linf"),
        (["explain", "{d}/0.png", "--target=1", "--norm=linf"], "at most 1"),
        (["explain", "{d}/0.png", "--target=1", "--step_size=0"], "positive"),
        (
            ["edit", "{d}/0.png", "--task=paint"],
            "unknown --task 'paint': choose one of",
        ),
        (["edit", "{d}/0.png", "--task=inpaint"], "needs --mask"),
        (["edit", "{d}/0.png", "--task=inpaint", "--mask=m.png"], "no mask 'm.png'"),
        (
            ["edit", "{d}/0.png", "--task=inpaint", "--mask={d}/../none.png"],
            "black everywhere",
        ),
        (["edit", "{d}/0.png", "--task=translate"], "needs --target"),
        (["edit", "{d}/0.png", "--task=translate", "--target=any"], "needs a class"),
        (["edit", "{d}/0.png", "--task=translate", "--target=1,2"], "one class"),
        (["edit", "{d}/0.png", "--task=denoise"], "needs --sigma"),
        (["edit", "{d}/0.png", "--task=denoise", "--sigma=-1"], "sigma is -1"),
        (
            ["edit", "{d}/0.png", "--task=denoise", "--sigma=nan", "--degrade"],
            "sigma is nan",
        ),
        (
            ["edit", "{d}/0.png", "--task=denoise", "--sigma=1", "--seed=-1"],
            "seed is -1",
        ),
        (
            [
                *("edit", "{d}/0.png", "--task=inpaint", "--mask={d}/0.png"),
                *("--fill=noise", "--seed=9999999999999999999999"),
            ],
            "seed is 9999999999999999999999",
        ),
        (
            ["edit", "{d}/0.png", "--task=denoise", "--sigma=1", "--factor=2"],
            "takes no",
        ),
        (
            ["edit", "{d}/0.png", "--task=denoise", "--sigma=1", "--norm=linf"],
            "--norm=linf is of the ball",
        ),
        (
            ["edit", "{d}/0.png", "--task=denoise", "--sigma=1", "--fill=noise"],
            "takes no --fill",
        ),
        (
            ["edit", "{d}/0.png", "--task=superres", "--factor=2", "--strength=1"],
            "takes no --strength",
        ),
        (["edit", "{d}/0.png", "--task=superres", "--factor=3"], "divides the sides"),
        (["edit", "{d}/0.png", "--task=superres", "--factor=2"], "4 x 4 are needed"),
        (
            ["edit", "{d}/0.png", "--task=denoise", "--sigma=1", "--reference=r.png"],
            "no reference 'r.png'",
        ),
        (
            ["edit", "{d}", "--task=denoise", "--sigma=1", "--reference={d}/0.png"],
            "6 images and 1 --reference",
        ),
        (
            ["edit", "{d}/0.png", "--task=translate", "--target=1", "--degrade"],
            "no truth",
        ),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    workdir, loaded, digits, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(trained, "load", lambda *a, **k: loaded)
    given = [argument.format(d=digits) for argument in arguments]
    with pytest.raises(UserError, match=message):
        run(given[0], workdir, tmp_path / "out", *given[1:])
    assert not (tmp_path / "out").exists()


def test_one_command_writes_into_a_folder_at_a_time(
    workdir, loaded, digits, tmp_path, monkeypatch, plain
):
    monkeypatch.setattr(trained, "load", lambda *a, **k: loaded)
    commands = [
        ("explain", digits / "0.png", "--target=1"),
        ("edit", digits / "0.png", "--task=translate", "--target=1"),
    ]
    with workdir_lock.held(tmp_path, "--out"):
        for command in commands:
            with pytest.raises(UserError, match="in use by another job.*--out"):
                run(command[0], workdir, tmp_path, *command[1:])
        assert [path.name for path in tmp_path.iterdir()] == [workdir_lock.FILE]


def test_home_is_found_in_paths(workdir, loaded, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "load", lambda *a, **k: loaded)
    monkeypatch.setenv("HOME", str(digits.parent))
    flags = ["--task=inpaint", "--mask=~/none.png", "--target=1"]
    with pytest.raises(UserError, match="black everywhere"):
        run("edit", workdir, tmp_path, "~/digits/0.png", *flags)
    with pytest.raises(UserError, match="no image '~nobody-here/0.png'"):
        run("explain", workdir, tmp_path, "~nobody-here/0.png", "--target=1")


def test_missing_and_unknown_flags_exit_with_2(capsys):
    for arguments in (["explain", "x.png", "--out=o"], ["edit", "--taks=inpaint"]):
        with pytest.raises(SystemExit) as stopped:
            command.main(arguments)
        assert stopped.value.code == 2
        assert "--help" in capsys.readouterr().err


def test_commands_are_found_by_their_first_word(monkeypatch):
    called = []
    monkeypatch.setattr(draw, "run", lambda given, console: called.append(given))
    command.main(["--workdir=w", "--out=o", "--classes=explain"])
    assert called[0].classes == "explain"


def test_results_do_not_go_among_the_images_that_are_read(
    workdir, digits, tmp_path, monkeypatch
):
    for out in (digits, digits / "why"):
        with pytest.raises(UserError, match="whose images are read"):
            run("explain", workdir, out, digits, "--target=1")
        with pytest.raises(UserError, match="whose images are read"):
            command.main(
                [f"--workdir={workdir}", f"--out={out}", f"--seeds=folder:{digits}"]
            )
    assert not (digits / "why").exists()
    monkeypatch.chdir(tmp_path)  # A folder may be called as the seeds are.
    for _ in range(2):
        command.main([f"--workdir={workdir}", "--out=noise", "--count=1"])
