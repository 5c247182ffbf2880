"""The page in a real browser: every tab used once, several visitors, no other server.

Skipped where Gradio, Playwright or a Chromium is missing.
"""

import io
import os
import shutil
import zipfile

import numpy as np
import pytest
import small  # noqa: F401  (the network of the trained workdir)
from PIL import Image
from rich.console import Console

pytest.importorskip("gradio", reason="Gradio is not installed (extra demo)")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright")

from atebm_jax.demo import page
from atebm_jax.demo.answers import Answers

WAIT = 120_000  # milliseconds, on a machine that does much else


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = shutil.which("chromium") or (own if os.path.exists(own) else None)
        if path is None:
            pytest.skip("there is no Chromium here")
        opened = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--use-gl=swiftshader"]
        )
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def answers(trained):
    return Answers(str(trained), Console(file=io.StringIO()), plain=str(trained))


@pytest.fixture(scope="module")
def address(answers):
    blocks = page.launch(answers, prevent_thread_lock=True, quiet=True)
    yield blocks.local_url
    blocks.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page as a new visitor; at the end nothing went wrong or elsewhere."""
    contexts, wrong = [], []

    def open_page(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        opened = context.new_page()
        opened.set_default_timeout(WAIT)
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.on("request", lambda request: elsewhere(request.url))
        opened.goto(address)
        opened.get_by_role("button", name="Draw samples").wait_for()
        return opened

    def elsewhere(url):
        if not url.startswith((address, "data:", "blob:")):
            wrong.append(f"request to {url}")

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def use(visitor, tab, button, inner=None):
    """Opens a tab and presses its button; returns the part of the page."""
    for name in filter(None, (tab, inner)):
        visitor.get_by_role("tab", name=name, exact=True).click()
    visitor.get_by_role("button", name=button, exact=True).click()


def pixels_of(visitor, label):
    """The image, as it is downloaded, of the visible picture with a label."""
    block = visitor.locator(".block:visible").filter(
        has=visitor.locator(f"label:text-is('{label}')")
    )
    shown = block.locator("img").first
    shown.wait_for()
    made = visitor.request.get(shown.get_attribute("src"))
    assert shown.evaluate("image => image.clientWidth") > 60
    return np.asarray(Image.open(io.BytesIO(made.body())))


def downloaded(visitor):
    """The files of the visible answer."""
    visitor.get_by_role("button", name="Make it again").locator("visible=true").click()
    button = visitor.get_by_text("Download images and settings").locator("visible=true")
    with visitor.expect_download() as download:
        button.click()
    with zipfile.ZipFile(download.value.path()) as file:
        return {name: file.read(name) for name in file.namelist()}


def read(files, name):
    return np.asarray(Image.open(io.BytesIO(files[name])))


def test_samples_are_shown_downloaded_and_taken_in_hand(visit):
    visitor = visit()
    use(visitor, "Sample", "Draw samples")
    visitor.get_by_text("step 3 of 3").wait_for()
    files = downloaded(visitor)
    assert len(files) == 17 and read(files, "04_4.png").shape == (8, 8)
    samples = visitor.locator(".gallery-item:visible, .thumbnail-item:visible")
    samples.nth(0).wait_for()
    visitor.locator("button.thumbnail-lg:visible").nth(-12).click()
    visitor.wait_for_timeout(1000)
    hand = pixels_of(visitor, "Image in hand")
    assert any(np.array_equal(hand, read(files, f)) for f in files if "png" in f)
