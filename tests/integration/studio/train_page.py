"""The tab Train as a person uses it, for tests in a real browser."""

from __future__ import annotations

import json
import os
import signal
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from restune_diffusion.run_queue import RunQueue, living_supervisor
from restune_diffusion.utils.errors import RestuneError

from ...conftest import ROOT

DEMO = ROOT / "restune_diffusion" / "assets" / "demo"
# The machine may be busy with other tests.
PATIENCE_SECONDS = 400


def zip_of_icons(path: Path, count: int, further: dict[str, bytes] | None = None) -> Path:
    """Write a zip of icons in an ink style, in a folder, with the names of the things as captions."""
    rows = [json.loads(line) for line in (DEMO / "metadata.jsonl").read_text().splitlines()[:count]]
    with zipfile.ZipFile(path, "w") as archive:
        for row in rows:
            image = DEMO / row["file_name"]
            archive.write(image, f"icons/{image.name}")
            archive.writestr(f"icons/{image.stem}.txt", image.stem.replace("-", " "))
        for name, content in (further or {}).items():
            archive.writestr(f"icons/{name}", content)
    return path


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for a condition and return its value."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not in {PATIENCE_SECONDS} s: {what}"
        time.sleep(0.1)
    return found


class TrainPage:
    """The tab on one page of a browser.

    Args:
        page: Playwright's page.
    """

    def __init__(self, page: Any) -> None:
        self.page = page
        page.set_default_timeout(PATIENCE_SECONDS * 1000)
        page.wait_for_selector("#train-pages")

    def show(self, name: str) -> None:
        """Open one of the two pages of the tab."""
        self.page.locator("#train-pages").get_by_role("tab", name=name).first.click()

    def drop(self, *files: Path) -> None:
        """Drop files on the page."""
        self.show("New run")
        self.page.locator("#train-files input[type=file]").set_input_files([str(file) for file in files])

    def text(self, name: str) -> str:
        """Return the text of an element of the tab, empty if it is not on the page."""
        found = self.page.locator(f"#train-{name}")
        return str(found.inner_text()) if found.count() and found.is_visible() else ""

    def value(self, name: str) -> str:
        """Return the text in a field."""
        return str(self.page.locator(f"#train-{name}").locator("input, textarea").first.input_value())

    def type(self, name: str, text: str) -> None:
        """Write into a field."""
        field = self.page.locator(f"#train-{name}").locator("input, textarea").first
        field.fill(text)
        field.blur()

    def fold(self, name: str) -> None:
        """Open or close a folded part."""
        self.page.get_by_role("button", name=name).click()

    def paste(self, text: str) -> None:
        """Fill the form from a text."""
        if not self.page.locator("#train-pasted").is_visible():
            self.fold("The same run as a command, and as a file")
        self.type("pasted", text)
        self.page.locator("#train-read").click()

    def await_text(self, name: str, part: str) -> str:
        """Wait until an element has a text."""
        return str(
            until(lambda: part in (text := self.text(name)) and text, f"{part!r} in {name}: {self.text(name)!r}")
        )

    def start(self) -> None:
        """Start the run of the form."""
        self.page.locator("#train-start").click()
        self.page.wait_for_selector("#train-run .run-head")

    def press(self, action: str) -> None:
        """Press the button of an action on the chosen run."""
        self.page.locator(f"#train-{action}").click()

    def step(self) -> int:
        """Return the step that the page shows for the chosen run."""
        bar = self.page.locator("#train-run [role=progressbar]")
        return int(bar.get_attribute("aria-valuenow")) if bar.count() else 0


def end_queue(home: Path) -> None:
    """End the processes of a studio's queue, which outlive the studio."""
    queue = RunQueue(home / "queue")
    pid = living_supervisor(queue.folder)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    for run in queue.runs():
        if run.state in ("waiting", "running"):
            with suppress(RestuneError):
                queue.cancel(run.id, now=True)
