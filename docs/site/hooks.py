"""Hooks of mkdocs: pages from outside `docs/`, and links between all of them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/**/*.md",
    "integrations/comfyui/README.md",
    "restune_diffusion/assets/restune-tiny/README.md",
    "examples/README.md",
)
"""Pages outside `docs/` that are part of the site, as patterns relative to the repository."""
SUFFIXES = (".png", ".svg", ".json")
"""Files that are taken over from the folders of these pages."""
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside `docs/`, with the images and tables beside them."""
    for page in (page for pattern in PAGES for page in sorted(ROOT.glob(pattern))):
        beside = [] if page.parent == ROOT else page.parent.rglob("*")
        for path in (page, *(path for path in beside if path.suffix in SUFFIXES)):
            name = path.relative_to(ROOT).as_posix()
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links between pages that are elsewhere in the repository; a link to a file without a page is text."""
    own = page.file.src_uri
    source = own if page.file.generated_by else f"docs/{own}"
    return _LINK.sub(lambda match: _link(match, source, own, files), markdown)


def _link(match: re.Match[str], source: str, own: str, files: Files) -> str:
    image, text, target = match.groups()
    path, mark, anchor = target.partition("#")
    if "://" in target or target.startswith("mailto:") or not path:
        return match[0]
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    file = {"README.md": "docs/index.md"}.get(file, file)
    uri = file.removeprefix("docs/")
    if files.get_file_from_path(uri) is None:
        return text
    relative = posixpath.relpath(uri, posixpath.dirname(own) or ".")
    return f"{image}[{text}]({relative}{mark}{anchor})"
