"""Docs, docstrings, comments and messages use plain English and the field's terms (CONTRIBUTING.md, "Writing")."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import ROOT

CODE = ("restune_diffusion", "train", "pipelines", "examples", "integrations", "benchmarks", "research")
PAGES = ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "examples/*.md", "integrations/**/*.md", "benchmarks/*.md")
# What to write instead stands behind each phrase.
PHRASES = {
    r"\banew\b": "again",
    r"\bmeanwhile\b": "inside the context; until then",
    r"\bat hand\b": "available",
    r"^within, ": "Context manager that ...",
    r"\bhas not the\b": "is not, lacks",
    r"(?<!there )\bis no (?!longer|more|different)": "is not a",
    r"\bwins? over\b": "override, take precedence over",
    r"\bso many\b": "every N, N",
    r"\bwhoever\b": "a user who, the caller",
    r"\bshall\b": "must",
    r"\bbut for\b": "except for",
    r"\bbe it\b": "whether",
    r"^(say|tell|see) (how|what|whether|which|in|that|the)\b": "Describe, Return whether, Print",
    r"\b(says?|tells?) (how|what|whether|which|where)\b": "describes, states, names",
    r"\b(is|are|was|were) told\b": "is printed, is reported",
    r"\bby heart\b": "memorized, overfitted",
    r"\bnew words?\b": "placeholder token",
    r"\bhal(f|ves) of guidance\b": "guidance branch, conditional and unconditional",
    r"\bkinds? of (tuners?|bases?)\b": "family, type",
    r"\bwhere not given\b": "by default",
    r"\b(stranger|somebody)\b": "another user",
    r"\bstands? on\b": "uses, is built from",
    r"\b(feature )?banks?\b": "feature cache",
    r"\bleaks?\b": "drift",
    r"\bsteer(s|ed|ing)?\b": "condition, control image",
    r"\bpictures?\b": "image, sample",
    r"\bdrawings?\b": "sample, image",
    r"\bdraws? anew\b": "generate again",
    r"\b(un)?learnt\b": "learned",
    r"\bcolour": "color",
    r"\bgrey\b": "gray",
}


def spoken(source: str) -> Iterator[tuple[int, str]]:
    """Yield the docstrings, comments and messages of a module, each with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
        elif isinstance(node, ast.Raise) and node.exc is not None:
            for part in ast.walk(node.exc):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")


def without_code(text: str) -> str:
    """Drop what is quoted as code, where old names may stand."""
    return re.sub(r"```.*?```|`[^`]*`|^    .*$", " ", text, flags=re.S | re.M)


def faults(text: str) -> list[str]:
    plain = re.sub(r"`[^`]*`|^\s*python .*$", " ", text, flags=re.M)
    return [
        f"{found[0]!r}: write {better!r}"
        for phrase, better in PHRASES.items()
        for found in [re.search(phrase, plain, re.IGNORECASE | re.MULTILINE)]
        if found
    ]


@pytest.mark.parametrize("path", [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))], ids=str)
def test_a_module_is_in_plain_english(path: Path):
    found = [f"line {line}: {fault}" for line, text in spoken(path.read_text("utf-8")) for fault in faults(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", [path for page in PAGES for path in sorted(ROOT.glob(page))], ids=str)
def test_a_page_is_in_plain_english(path: Path):
    assert not faults(without_code(path.read_text("utf-8")))
