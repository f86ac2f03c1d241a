"""Headless Chromium for tests of decoding/page.html, and what a person does on the page.

Needs Debian's chromium, which .ci/run installs, and playwright (tests/requirements.txt). Where one
is missing the tests are skipped; tests/test_page.py asks the server the same without a browser.
PAGE_SCREENSHOTS=FOLDER keeps a picture of each test there."""

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCENE = ROOT / "tests/scene.png"
CHROMIUM = shutil.which("chromium")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install it")
    if not CHROMIUM:
        pytest.skip("no chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, headless=True, args=[*FLAGS])
        yield browser                   # it makes an empty folder of its own for each start
        browser.close()


@pytest.fixture
def page(chromium, visitor, request, tmp_path):
    """The page of `visitor`, as a person opens it. An error of its script fails the test."""
    context = chromium.new_context(viewport={"width": 1100, "height": 850}, has_touch=True,
                                   accept_downloads=True)
    tab, errors = context.new_page(), []
    tab.set_default_timeout(60_000)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    open_page(tab, visitor)
    yield tab
    shoot(tab, request.node.name, tmp_path)
    context.close()
    # the browser logs each request that is refused; all else is a fault of the page
    assert [error for error in errors if "Failed to load resource" not in error] == []


def shoot(tab, name, folder):
    """A picture of the whole page; what a test leaves is kept under the test's name."""
    folder = Path(os.environ.get("PAGE_SCREENSHOTS", folder))
    if not (folder / f"{name}.png").exists():
        tab.screenshot(path=folder / f"{name}.png", full_page=True)


def until(tab, expression):
    """Wait until the JavaScript is true. Playwright's way needs eval, which the page forbids."""
    for _ in range(2000):
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(30)
    raise AssertionError(f"never true: {expression}")


def open_page(tab, visitor):
    tab.goto(f"http://{visitor.host}/")
    tab.wait_for_selector("#template:not(:empty)")


def put(tab, *files):
    """Choose pictures, by their files."""
    count = tab.locator("#pending figure").count() + len(files)
    tab.set_input_files("#files", files)
    until(tab, f"document.querySelectorAll('#pending figure').length === {count}")


def ask(tab, text, wait=True):
    """Type a question and press Enter; the article with its answer."""
    number = tab.locator("article").count()
    tab.fill("#question", text)
    tab.press("#question", "Enter")
    article = tab.locator("article").nth(number)
    if wait:
        article.locator("details").wait_for(state="attached")
    return article
