"""What the tabs of the page answer, without a browser."""

import io
import json
import shlex
import zipfile

import numpy as np
import pytest
import small  # noqa: F401  (the network of the trained workdir)
from PIL import Image
from rich.console import Console

from atebm_jax import UserError, api, drawing, editing, trained
from atebm_jax.demo import answers as kinds
from atebm_jax.demo.__main__ import main
from atebm_jax.demo.answers import ANY, GUESS, RADII, Answers
from atebm_jax.sample import __main__ as command


@pytest.fixture(scope="module")
def said():
    return io.StringIO()


@pytest.fixture(scope="module")
def answers(trained, said):
    return Answers(str(trained), Console(file=said, width=200), plain=str(trained))


@pytest.fixture
def image(answers):
    return answers.examples[0]


HOLE = np.zeros((8, 8), bool)
HOLE[2:5, 3:6] = True


def pixels(path):
    return np.asarray(Image.open(path))


def test_start_says_what_is_compiled(answers, said):
    lines = said.getvalue().splitlines()
    number = sum(line.startswith("compiled ") for line in lines)
    assert f"compiled {number} of {number}: attack" in lines[-1]


def test_nothing_is_compiled_after_the_start(answers, image):
    programs = (drawing._program, editing._program, api._attacker, api._logits)
    before = [program.cache_info().currsize for program in programs]
    steps = [3, 5]
    for number, sampler in enumerate(kinds.SAMPLERS):
        list(answers.sample(None, 3 + number, number, 4, 0.1 * (1 + number), sampler))
    for radius, step in zip((0.5, 1.25), steps):
        answers.edit("explain", image, 3, step, radius)
        answers.edit("denoise", image, GUESS, step, radius, radius / 4, 1)
        answers.edit("inpaint", image, ANY, step, hole=HOLE)
        answers.attack(image, answers.most_attack * radius / 2)
    assert [program.cache_info().currsize for program in programs] == before


def test_moving_a_slider_asks_the_network_nothing_new(answers, image):
    answers.edit("explain", image, 3, 4, 1.0)
    misses = answers._cached.cache_info().misses
    lengths = []
    for radius in (0.25, 2.0):
        made = answers.edit("explain", image, 3, 4, radius)
        lengths.append(made.settings["results"]["distance"]["l2"])
        assert made.settings["radius"] == radius
    assert lengths[0] < lengths[1] and lengths[0] == pytest.approx(0.25, rel=1e-3)
    assert answers._cached.cache_info().misses == misses


@pytest.mark.parametrize("sampler", ["pgd", "momentum"])
def test_samples_appear_step_by_step_and_end_as_those_of_one_run(answers, sampler):
    shown = list(answers.sample(4, 3, 7, 20, 0.1, sampler))
    assert len(shown) > 3 and shown[-1].says == "step 20 of 20"
    how = {"seed": 7, "step_size": 0.1, "sampler": sampler}
    whole = answers.model.sample([4, 4, 4], num_steps=20, **how)
    last = np.stack(list(shown[-1].images.values()))
    np.testing.assert_array_equal(last, kinds._levels(whole))
    first = np.stack(list(shown[0].images.values()))
    assert (first != last).any()


ASKED = {
    "sample": lambda a, x: list(a.sample(None, 3, 1, 4, 0.1, "adam"))[-1],
    "explain": lambda a, x: a.edit("explain", x, 8, 4, 1.5),
    "inpaint": lambda a, x: a.edit("inpaint", x, GUESS, 4, hole=HOLE),
    "denoise": lambda a, x: a.edit("denoise", x, ANY, 4, 0.75, 0.2, 3),
}


@pytest.mark.parametrize("tab", ASKED)
def test_download_makes_the_same_images_again(
    answers, image, tab, tmp_path, monkeypatch
):
    made = ASKED[tab](answers, image)
    with zipfile.ZipFile(io.BytesIO(made.archive())) as file:
        file.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    words = shlex.split(settings["again"])
    assert words[:3] == ["python", "-m", "atebm_jax.sample"]
    command.main(words[3:], Console(file=io.StringIO()))
    results = sorted(p for p in (tmp_path / "again").glob("*.png") if "_" in p.name)
    results = [path for path in results if "strip" not in path.name]
    if tab == "sample":
        expected = [tmp_path / f"{name}.png" for name in made.images]
    else:
        expected = [tmp_path / "result.png"]
    assert len(results) == len(expected)
    for result, one in zip(results, expected):
        np.testing.assert_array_equal(pixels(result), pixels(one))


def test_inpainting_changes_the_hole_alone(answers, image):
    made = answers.edit("inpaint", image, 3, 6, hole=HOLE)
    changed = (made.images["result"] != image)[..., 0]
    assert changed.any() and not (changed & ~HOLE).any()
    assert (made.images["mask"][..., 0] == 255 * HOLE).all()


def test_attack_compares_both_networks_and_leaves_the_image_at_radius_0(answers, image):
    made = answers.attack(image, 0)
    assert list(made.classes) == ["before", "after", "before (plain)", "after (plain)"]
    assert made.classes["before"] == made.classes["after"]
    np.testing.assert_array_equal(made.images["attacked"], image)
    attacked = answers.attack(image, answers.most_attack)
    label = max(made.classes["before"], key=made.classes["before"].get)
    assert attacked.classes["after"][label] < made.classes["before"][label]
    change = attacked.images["attacked"] / 255 - image / 255
    assert 0 < np.linalg.norm(change) <= answers.most_attack + 0.02


def test_energy_says_where_an_image_lies(answers, image):
    assert list(answers.energies) == ["test images", "noise", "samples"]
    made = answers.energy(image)
    share = (answers.energies["noise"] > made.settings["energy"]).mean()
    assert f"{share:.0%} of noise" in made.says
    picture = Image.open(io.BytesIO(made.figure))
    assert picture.mode == "RGBA" and picture.width > 800
    assert picture.getpixel((1, 1))[3] == 0


def test_examples_are_test_images_with_their_classes(answers):
    assert answers.examples.shape == (24, 8, 8, 1)
    assert set(answers.captions) <= set("0123456789")


def test_without_a_test_set_the_examples_are_samples(answers, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(kinds.Answers, "_compile", lambda *_: None)
    load = trained.load

    def elsewhere(path):
        loaded = load(path)
        loaded.config.data.test = "cifar:nowhere.tar.gz:test"
        return loaded

    monkeypatch.setattr(trained, "load", elsewhere)
    alone = Answers(answers.workdir, Console(file=said, width=300))
    assert "examples are samples" in said.getvalue()
    assert alone.captions[3] == "sample: 3" and "test images" not in alone.energies
    with pytest.raises(UserError, match="nowhere"):
        Answers(answers.workdir, Console(file=said), source="cifar:nowhere.gz:test")


def sampled(*values):
    return lambda a, x: list(a.sample(*values))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (sampled(11, 1, 0, 1, 0.1, "pgd"), "class is 11: expected 0 to 9"),
        (sampled(0, 33, 0, 1, 0.1, "pgd"), "images is 33: expected 1 to 32"),
        (sampled(0, 1.5, 0, 1, 0.1, "pgd"), "images is 1.5: expected a whole number"),
        (sampled(0, 1, -1, 1, 0.1, "pgd"), "seed is -1"),
        (sampled(0, 1, 0, 10**9, 0.1, "pgd"), "steps is 1000000000: expected 0 to 200"),
        (sampled(0, 1, 0, 1, 0.0, "pgd"), "positive"),
        (sampled(0, 1, 0, 1, None, "pgd"), "step_size None"),
        (sampled(0, 1, 0, 1, 0.1, "sgld(noise=1)"), "unknown sampler"),
        (lambda a, x: a.edit("explain", x, ANY, 4, 1.0), "class is 'any'"),
        (
            lambda a, x: a.edit("explain", x, 1, 4, 99.0),
            "radius is 99.0: expected 0.25 to 8",
        ),
        (
            lambda a, x: a.edit("explain", x, 1, 65, 1.0),
            "steps is 65: expected 0 to 64",
        ),
        (lambda a, x: a.edit("denoise", x, ANY, 4, 0.5, 0.0), "noise is 0.0"),
        (lambda a, x: a.edit("denoise", x, "all", 4, 0.5), "class is 'all'"),
        (lambda a, x: a.edit("denoise", x, ANY, 4, 0.5, 0.1, 2.5), "seed is 2.5"),
        (
            lambda a, x: a.edit("inpaint", x, ANY, 4, hole=HOLE & ~HOLE),
            "mask has no hole",
        ),
        (lambda a, x: a.attack(x, -1), "radius is -1: expected 0 to 2"),
    ],
)
def test_values_out_of_range_get_a_sentence(answers, image, ask, message):
    with pytest.raises(UserError, match=message):
        ask(answers, image)


def test_upload_that_is_no_image_gets_a_sentence_with_its_name_alone(answers, tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("no image")
    with pytest.raises(UserError, match="^notes.png cannot be read as an image"):
        answers.read(str(path))
    # An upload of another size and with colours is brought to the network's.
    photo = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    Image.fromarray(photo).save(path)
    assert answers.read(str(path)).shape == (8, 8, 1)


def test_radii_are_those_of_the_sliders():
    assert len(RADII) == len(kinds.STRENGTHS) == drawing.CHUNK


def test_networks_for_other_images_are_not_compared(answers):
    other = answers.model.__class__.__new__(answers.model.__class__)
    other.image_shape, other.class_names = (32, 32, 3), answers.names
    with pytest.raises(UserError, match="same images and classes"):
        kinds._check_alike(answers.model, other)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    monkeypatch.delitem(__import__("sys").modules, "atebm_jax.demo.page", raising=False)
    with pytest.raises(UserError, match=r"pip install 'atebm_jax\[demo\]'"):
        main(["--workdir=nowhere"])
