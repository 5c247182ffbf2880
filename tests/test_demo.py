"""The page: what its tabs answer, and the tabs in a real browser."""

import importlib.metadata
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import threading
import time
import tomllib
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import small  # noqa: F401  (the network of the trained workdir)
import tiny
from PIL import Image
from rich.console import Console

from atebm_jax import UserError, api, drawing, editing, trained
from atebm_jax.demo import answers as kinds
from atebm_jax.demo.__main__ import _GRADIO, main
from atebm_jax.demo.answers import ANY, GUESS, RADII, Answers
from atebm_jax.sample import __main__ as command

ROOT = Path(__file__).parents[1]


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
    programs = (drawing.chunk_program, editing._program, api._attacker, api._logits)
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
    assert 0.1 < lengths[0] <= 0.25 + 1e-6 < lengths[1]
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


def test_samples_are_captioned_with_class_names_that_no_file_could_have(
    answers, monkeypatch
):
    monkeypatch.setattr(answers, "names", [f"Class {k}/{k}" for k in range(10)])
    (made, *_) = answers.sample(4, 2, 0, 0, 0.1, "pgd")
    assert list(made.images) == ["00_place4", "01_place4"]
    assert made.captions == ["Class 4/4", "Class 4/4"]


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
    assert picture.mode == "RGBA" and picture.width > 700
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
        (sampled(0, 1, 0, 1, None, "pgd"), "step size is None"),
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


@pytest.mark.parametrize("here", [None, "5.49.1", "6.9.0"])
def test_missing_or_old_package_is_named(monkeypatch, here):
    def version(name):
        if here is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return here

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = f"and {here} is here" if here else "which is missing"
    says = rf"version {re.escape(_GRADIO)} or newer, {found}"
    with pytest.raises(UserError, match=rf"{says}: pip install 'atebm_jax\[demo\]'"):
        main(["--workdir=nowhere"])


def test_extra_and_command_want_the_same_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["demo"] == [f"gradio>={_GRADIO}"]


# The page itself.


@pytest.fixture(scope="module")
def page():
    pytest.importorskip("gradio", reason="Gradio is not installed (extra demo)")
    from atebm_jax.demo import page

    return page


@pytest.fixture(scope="module")
def blocks(page, answers):
    opened = page.launch(answers, prevent_thread_lock=True, quiet=True)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    with api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = shutil.which("chromium") or (own if os.path.exists(own) else None)
        if path is None:
            pytest.skip("there is no Chromium here")
        options = {"executable_path": path, "args": ["--no-sandbox"]}
        opened = playwright.chromium.launch(**options)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, blocks):
    """Opens the page for a visitor; nothing may go wrong, or to other servers."""
    contexts, wrong = [], []

    def requested(request):
        if not request.url.startswith((blocks.local_url, "data:", "blob:")):
            wrong.append(f"request to {request.url}")

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        visitor = contexts[-1].new_page()
        visitor.set_default_timeout(120_000)
        visitor.on("pageerror", lambda error: wrong.append(str(error)))
        visitor.on("request", requested)
        visitor.goto(blocks.local_url)
        visitor.get_by_text("Predicted class").wait_for()
        picture(visitor, "Image in hand")
        return visitor

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def steps(answers):
    """The default of the sliders."""
    return int(answers.config.evaluate.samples.num_steps)


def use(visitor, tabs, button):
    """Opens tabs, one in the other, and presses a button."""
    for name in tabs:
        visitor.get_by_role("tab", name=name, exact=True).click()
    visitor.get_by_role("button", name=button, exact=True).click()


def picture(visitor, label):
    """The pixels of the visible picture with a label."""
    block = visitor.locator(".pixels:visible").filter(
        has=visitor.locator("label", has_text=label)
    )
    image = block.locator("img").first
    image.wait_for()
    box = image.bounding_box()
    assert box["width"] > 100 and box["width"] == pytest.approx(box["height"], abs=2)
    return fetched(image)


def fetched(image):
    with urllib.request.urlopen(image.get_attribute("src")) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())))


def downloaded(visitor):
    """The files of the visible answer, by name."""
    visitor.get_by_role("button", name="Make it again").click()
    with visitor.expect_download() as download:
        visitor.get_by_text("Download images and settings").click()
    return unpacked(Path(download.value.path()).read_bytes())


def unpacked(archive):
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_samples_are_drawn_downloaded_and_taken_in_hand(visit, answers, steps):
    visitor = visit(color_scheme="dark")
    use(visitor, ["Sample"], "Draw samples")
    visitor.get_by_text(f"step {steps} of {steps}").wait_for()
    last = list(answers.sample(None, 16, 0, steps, answers.step_size("pgd"), "pgd"))[-1]
    files = downloaded(visitor)
    assert {**files, "settings.json": b""} == {
        **unpacked(last.archive()),
        "settings.json": b"",
    }
    seven = visitor.get_by_role("tabpanel").get_by_label("Thumbnail 8 of 16")
    assert np.array_equal(fetched(seven.locator("img")), last.images["07_7"][..., 0])
    seven.click()
    tiny.wait_until(
        lambda: (picture(visitor, "Image in hand") == last.images["07_7"][..., 0]).all()
    )
    eight = visitor.get_by_role("tabpanel").get_by_label("Thumbnail 9 of 16")
    address = eight.locator("img").get_attribute("src")
    Path(address.partition("file=")[2]).unlink()
    eight.click()
    visitor.get_by_text("this sample is not kept any more").wait_for()


def test_sample_that_is_gone_is_said_in_a_sentence(page, blocks):
    [take] = [f.fn for f in blocks.fns.values() if f.name == "take"]
    for samples in (None, [("gone.png", "7")]):
        with pytest.raises(page.gr.Error, match="draw samples again"):
            list(take(samples, SimpleNamespace(index=0)))


def test_equal_images_have_files_of_their_own(page, image):
    """A file that is written again is cut short for whom it is being sent to."""
    grounds = [page._ground(image)["background"] for _ in range(2)]
    for made in ([page._shown(image), page._shown(image)], grounds):
        files = [page.gr.Image(format="png").postprocess(one).path for one in made]
        assert files[0] != files[1]
        assert np.array_equal(pixels(files[0]), pixels(files[1]))


def test_explain_attack_and_energy_show_what_they_answer(visit, answers, image, steps):
    visitor = visit()
    use(visitor, ["Explain"], "Explain")
    made = answers.edit("explain", image, 0, steps, 2.0)
    for name in ("original", "result", "difference"):
        shown = picture(visitor, name.capitalize())
        assert np.array_equal(shown, made.images[name].squeeze())
    slider = visitor.get_by_label("number input for Radius (L2)")
    slider.fill("0.25")
    slider.press("Enter")
    near = answers.edit("explain", image, 0, steps, 0.25).images["result"].squeeze()
    assert not np.array_equal(near, made.images["result"].squeeze())
    tiny.wait_until(lambda: np.array_equal(picture(visitor, "Result"), near))
    use(visitor, ["Attack"], "Attack")
    made = answers.attack(image, answers.most_attack / 4)
    for name in ("attacked", "difference", "attacked (plain)"):
        shown = picture(visitor, name.capitalize())
        assert np.array_equal(shown, made.images[name].squeeze())
    # Opening the tab is enough.
    visitor.get_by_role("tab", name="Energy").click()
    visitor.get_by_text(answers.energy(image).says).wait_for()


def test_mask_is_drawn_and_noise_removed(visit, answers, image, steps):
    visitor = visit()
    visitor.get_by_role("tab", name="Edit").click()
    use(visitor, [], "Inpaint")
    visitor.get_by_text("there is no mask: draw over a part").wait_for()
    canvas = visitor.locator("canvas:visible").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    visitor.mouse.move(x - 40, y)
    visitor.mouse.down()
    visitor.mouse.move(x + 40, y, steps=8)
    visitor.mouse.up()
    visitor.wait_for_timeout(500)
    use(visitor, [], "Inpaint")
    assert picture(visitor, "Result").shape == (8, 8)
    files = downloaded(visitor)
    mask, result = (
        np.asarray(Image.open(io.BytesIO(files[f"{name}.png"])))
        for name in ("mask", "result")
    )
    assert 0 < (mask > 0).mean() < 0.5
    assert (result != image[..., 0])[mask == 0].sum() == 0
    use(visitor, ["Denoise"], "Denoise")
    made = answers.edit("denoise", image, ANY, steps, 0.5, 0.1, 0)
    for label, name in {"Before noise": "before noise", "Start": "start"}.items():
        assert np.array_equal(picture(visitor, label), made.images[name].squeeze())
    assert np.array_equal(picture(visitor, "Result"), made.images["result"].squeeze())


def test_uploads_are_taken_in_hand_or_refused_in_a_sentence(visit, answers, tmp_path):
    visitor = visit()
    (tmp_path / "notes.png").write_text("no image")
    upload = visitor.locator("input[type=file]").first
    upload.set_input_files(tmp_path / "notes.png")
    visitor.get_by_text("notes.png cannot be read as an image").wait_for()
    photo = np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    upload.set_input_files(tmp_path / "photo.jpg")
    expected = answers.read(str(tmp_path / "photo.jpg"))[..., 0]
    tiny.wait_until(lambda: np.array_equal(picture(visitor, "Image in hand"), expected))
    (tmp_path / "large.png").write_bytes(bytes(9 * 2**20))
    upload.set_input_files(tmp_path / "large.png")
    visitor.get_by_text("maximum allowed size").first.wait_for()


def test_two_visitors_have_their_own_images(visit, answers, steps):
    one, other = visit(), visit(viewport={"width": 390, "height": 844})
    one.get_by_label("Thumbnail 3 of 24").first.click()
    third = answers.examples[2][..., 0]
    tiny.wait_until(lambda: np.array_equal(picture(one, "Image in hand"), third))
    use(one, ["Sample"], "Draw samples")
    use(other, ["Sample"], "Draw samples")
    for visitor in (one, other):
        visitor.get_by_text(f"step {steps} of {steps}").wait_for()
    first = answers.examples[0][..., 0]
    assert np.array_equal(picture(other, "Image in hand"), first)


def ask_energy(blocks, session):
    """One request as the page makes it; whether it succeeded."""
    number = next(
        dependency["id"]
        for dependency in blocks.config["dependencies"]
        if len(dependency["inputs"]) == 1 and len(dependency["outputs"]) == 5
    )
    address = f"{blocks.local_url}gradio_api/queue/"
    body = {"data": [None], "fn_index": number, "session_hash": session}
    request = urllib.request.Request(
        f"{address}join",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    urllib.request.urlopen(request).close()
    with urllib.request.urlopen(f"{address}data?session_hash={session}") as events:
        for line in events:
            event = json.loads(line.removeprefix(b"data:")) if line.strip() else {}
            if event.get("msg") == "process_completed":
                return event["success"]
    return False


def test_fifty_quick_requests_are_answered_one_at_a_time(blocks, answers, monkeypatch):
    alone, figure = [], kinds.pictures.energies(answers.energies, 0.0)
    monkeypatch.setattr(kinds.pictures, "energies", lambda *_: figure)
    monkeypatch.setattr(answers.model, "energy", watched(answers.model.energy, alone))
    with ThreadPoolExecutor(50) as pool:
        sessions = [f"visitor{number}" for number in range(50)]
        assert all(pool.map(lambda session: ask_energy(blocks, session), sessions))
    assert len(alone) == 50 and all(alone)


def watched(function, alone):
    """Notes of every call whether no other one was running."""
    lock = threading.Lock()

    def call(*values):
        free = lock.acquire(blocking=False)
        alone.append(free)
        try:
            return function(*values)
        finally:
            if free:
                lock.release()

    return call


def test_closed_page_stops_its_sampling(visit, answers, monkeypatch):
    sample, drawn = answers.model.sample, []

    def slowly(*values, **options):
        drawn.append(options["num_steps"])
        time.sleep(0.5)
        return sample(*values, **options)

    monkeypatch.setattr(answers.model, "sample", slowly)
    visitor = visit()
    visitor.get_by_label("number input for Steps").first.fill("200")
    use(visitor, ["Sample"], "Draw samples")
    visitor.get_by_text("step 20 of 200").wait_for()
    visitor.context.close()
    other = visit()
    other.get_by_role("tab", name="Energy").click()
    other.get_by_text("likelier than").wait_for()
    assert sum(drawn) < 200
    time.sleep(1.5)
    before = len(drawn)
    time.sleep(1.5)
    assert len(drawn) == before


def test_files_of_visitors_are_deleted_when_the_docs_say(blocks):
    between, kept = blocks.delete_cache
    assert (kept, between) == (60 * 60, 5 * 60)


def test_policy_forbids_what_comes_from_elsewhere(blocks):
    with urllib.request.urlopen(blocks.local_url) as answer:
        assert answer.headers["content-security-policy"].startswith(
            "default-src 'self'"
        )


def test_taken_port_is_said_in_a_sentence(page, blocks, answers):
    port = int(blocks.local_url.rstrip("/").rpartition(":")[2])
    with pytest.raises(UserError, match=f"--port={port}"):
        page.launch(answers, port=port, prevent_thread_lock=True, quiet=True)


def test_command_says_where_the_page_is(page, answers, monkeypatch):
    opened, said = [], io.StringIO()
    monkeypatch.setattr(kinds, "Answers", lambda *_, **options: answers)
    waits = "gradio.Blocks.block_thread"
    monkeypatch.setattr(waits, lambda blocks: opened.append(blocks))
    main([f"--workdir={answers.workdir}"], Console(file=said, width=200))
    assert f"the page is at {opened[0].local_url};" in said.getvalue()
    opened[0].close()


def test_notebook_opens_the_page(page, trained, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda words, **_: commands.append(words))
    path = ROOT / "notebooks" / "demo.ipynb"
    cells = json.loads(path.read_text())["cells"]
    codes = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    file = tmp_path / "demo.py"
    file.write_text("\n".join(codes).replace('"zoo:cifar10"', repr(str(trained))))
    names = runpy.run_path(str(file))
    # Pip notices an old one.
    assert commands[0][-1] == f"gradio>={_GRADIO}"
    with urllib.request.urlopen(names["blocks"].local_url) as answer:
        assert b"gradio" in answer.read()
    names["blocks"].close()
