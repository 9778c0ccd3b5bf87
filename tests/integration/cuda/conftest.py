"""Run the tests of this folder on the stand-in for CUDA, each file in one process of its own; see `standin`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ...conftest import ROOT
from ...training_fixtures import base, config, images
from .standin import compiled_guard, loaded
from .standin.guard import compiler

__all__ = ["base", "config", "images"]

_HERE = Path(__file__).parent
_REPORTS = "RESTUNE_STANDIN_REPORTS"
"""Environment variable with the file to which the inner process writes its reports."""


@pytest.fixture
def cuda() -> Iterator[Any]:
    """Log of a CUDA device, which exists for the duration of the test; see `standin`."""
    from .standin.device import cuda_device

    with cuda_device() as log:
        yield log


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Report a test of this folder as the inner process ran it."""
    # Hooks of a conftest see the tests of all folders here.
    if loaded() or _HERE not in item.path.parents:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports_of(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # What the test before this one shares with this folder, but not with the next test, is still set up.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the reports of the inner process."""
    path = os.environ.get(_REPORTS)
    if loaded() and path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(report._to_json(), default=str) + "\n")


_results = pytest.StashKey[dict[Path, dict[str, list[pytest.TestReport]]]]()


def _reports_of(item: pytest.Item) -> list[pytest.TestReport]:
    if compiler() is None:
        return [_outcome(item, "skipped", (str(item.path), 0, "Skipped: no C++ compiler for the stand-in for CUDA"))]
    file = item.path
    results = item.session.stash.setdefault(_results, {})
    if file not in results:
        results[file] = _run([other for other in item.session.items if other.path == file], item.config)
    found = results[file].get(item.nodeid)
    lost = f"The process with the stand-in ended before this test:\n{results[file]['output'][0]}"
    return found or [_outcome(item, "failed", lost)]


def _run(items: list[pytest.Item], config: pytest.Config) -> dict[str, Any]:
    """Run tests in one process with the stand-in; return their reports by node id, and the end of its output."""
    compiled_guard()
    path = config._tmp_path_factory.mktemp("standin") / "reports.jsonl"
    path.touch()
    command = [sys.executable, "-m", f"{__package__}.standin", "-q", "--rootdir", str(ROOT)]
    environment = {**os.environ, _REPORTS: str(path), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    ran = subprocess.run(
        [*command, *(item.nodeid for item in items)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    reports: dict[str, Any] = {"output": [ran.stdout[-3000:]]}
    for line in path.read_text(encoding="utf-8").splitlines():
        report = pytest.TestReport._from_json(json.loads(line))
        reports.setdefault(report.nodeid, []).append(report)
    return reports


def _outcome(item: pytest.Item, outcome: Any, why: Any) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, {}, outcome, why, "call")
