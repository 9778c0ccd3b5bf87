"""Links, files, flags and modules that the docs name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from restune_diffusion.cli.app import TRAIN_HELP
from restune_diffusion.cli.train import parse_train_options

from ..conftest import ROOT

PAGES = sorted(
    path
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "examples/*.md",
        "benchmarks/**/*.md",
        "integrations/**/*.md",
        "restune_diffusion/assets/*/*.md",
    )
    for path in ROOT.glob(pattern)
)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(found), f"{target} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_modules_that_a_page_names_exist(page: Path):
    roots = [page.parent, ROOT, ROOT / "restune_diffusion", ROOT / "restune_diffusion" / "training"]
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    if page.name == "CHANGELOG.md":
        # The first column of its tables holds the names of before.
        text = re.sub(r"^ *\| .*$", "", text, flags=re.MULTILINE)
    for named in re.findall(r"`([\w./-]+/[\w-]+\.py)`", text):
        # Other projects' files are named too.
        ours = any((root / named.split("/")[0]).is_dir() for root in roots)
        assert not ours or any((root / named).exists() for root in roots), f"{named} does not exist"


def test_the_flags_of_training_that_the_docs_name_exist(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse_train_options(TRAIN_HELP, ["--help"])
    known = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        if page.name == "troubleshooting.md":  # mistakes
            continue
        text = page.read_text("utf-8")
        for command in re.findall(r"restune train((?:.*\\\n)*.*)", text):
            for flag in re.findall(r"(?<!\S)--[a-z][\w.-]*", command.split("#")[0]):
                assert flag.rstrip(".") in known, f"{page.relative_to(ROOT)}: {flag}"
