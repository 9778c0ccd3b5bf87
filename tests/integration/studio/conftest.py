"""A real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ...studio_process import StudioProcess

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The browser; for one module, because its event loop runs until it is closed, and other tests have their own."""
    # CI installs it, so that there these tests are never skipped.
    if CHROMIUM is None and not os.environ.get("CI"):
        pytest.skip("needs Debian's chromium")
    with playwright.sync_playwright() as driver:
        # An administrator's Chromium does not start in its sandbox.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioProcess]:
    """A studio on the bundled base, one for each module of tests."""
    with StudioProcess(tmp_path_factory.mktemp("studio") / "home") as process:
        yield process


class Page:
    """A page of the studio; at its end the browser must have reported no errors, and no request elsewhere."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1440, "height": 900}, **options)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.refused: list[str] = []
        self.page.on("console", lambda each: self.errors.append(each.text) if each.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._see)
        # The console's message has no address.
        self.page.on("response", lambda each: self.refused.append(each.url) if each.status >= 400 else None)
        self.page.goto(url)

    def _see(self, request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1", "data:", "blob:")):
            self.elsewhere.append(request.url)

    def close(self) -> None:
        """Close the page and check what the browser reported."""
        self.context.close()
        assert self.errors == [], self.refused
        assert self.elsewhere == []


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Function that opens a page of a studio, `open_page(studio.url).page`; all are checked at the end."""
    pages: list[Page] = []

    def open_one(url: str, **options: Any) -> Page:
        pages.append(Page(browser, url, **options))
        return pages[-1]

    yield open_one
    for page in pages:
        page.close()


@pytest.fixture
def shots() -> Path | None:
    """Folder for screenshots, if the variable STUDIO_SHOTS names one."""
    folder = os.environ.get("STUDIO_SHOTS")
    return Path(folder) if folder else None
