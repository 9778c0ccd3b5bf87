"""The commands in the docs are accepted by the parser of the command line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from restune_diffusion.cli.app import parse

from ..conftest import ROOT

PAGES = sorted(path for pattern in ("*.md", "docs/**/*.md", "examples/*.md") for path in ROOT.glob(pattern))
# An indented line or one in a fence, with the lines that continue it.
COMMAND = re.compile(r"^(?:    |\$ )?((?:[A-Z_]+=\S+ )*restune (?:.*\\\n)*.*)$", re.MULTILINE)


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # names of before
            continue
        for command in COMMAND.findall(page.read_text("utf-8")):
            found.append((page.relative_to(ROOT).as_posix(), command.replace("\\\n", " ")))
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_of_the_docs_is_valid(page: str, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    words = shlex.split(command, comments=True)
    (tmp_path / "run.yaml").write_text("base: b\ndata: d\noutput: o\n")
    monkeypatch.chdir(tmp_path)
    while "=" in words[0]:
        words.pop(0)
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", "|", ";"):
            parts.append([])
        else:
            parts[-1].append(word)
    for part in parts:
        if part[:1] == ["restune"] and "..." not in part and "--help" not in part and part != ["restune", "--version"]:
            parse(part[1:])
