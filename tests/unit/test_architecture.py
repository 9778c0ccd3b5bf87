"""Rooms import downwards only, without a circle, and no file or folder outgrows a reader."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from ..conftest import ROOT

PACKAGE = "restune_diffusion"
# From the top floor to the ground: a room may import those that come after it.
ROOMS = (
    "cli", "studio", "serving", "run_queue", "training", "evaluation", "data", "pipelines", "conversion", "storage",
    "hooks", "tuners", "backbones", "imaging", "utils",
)  # fmt: skip
# Public names from before the rooms; nothing inside the package imports them.
FACADES = ("conditions", "interchange")
FOLDERS = (PACKAGE, "train", "pipelines", "research", "benchmarks", "integrations", "tests", "examples")
MOST_LINES, MOST_MODULES = 400, 15


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imports_of(module: str, path: Path) -> Iterator[str]:
    """Modules of the package that a module imports, also inside functions and under TYPE_CHECKING."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            steps = package.split(".")
            above = ".".join(steps[: len(steps) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, [above, node.module]))
            for alias in node.names:
                target = f"{source}.{alias.name}"
                yield target if target in MODULES else source
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


GRAPH: Mapping[str, set[str]] = {
    module: {target for target in imports_of(module, path) if target in MODULES} for module, path in MODULES.items()
}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_module_stands_in_a_room():
    outside = {room_of(module) for module in MODULES} - {*ROOMS, *FACADES, "", "__main__"}
    assert not outside


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) in ROOMS])
def test_a_room_imports_only_those_below_it(module):
    floor = ROOMS.index(room_of(module))
    for target in GRAPH[module]:
        assert room_of(target) in ROOMS, f"{module} imports {target}, which is not in a room"
        assert ROOMS.index(room_of(target)) >= floor, f"{module} imports {target}, which lies above it"


def test_no_imports_go_in_a_circle():
    # A package's __init__ passes on names of its own modules, which do not import it.
    graph = {module: targets - {module} for module, targets in GRAPH.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_longer_than_a_reader_takes_in(folder):
    for path in (ROOT / folder).rglob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MOST_LINES, f"{path.relative_to(ROOT)} has {lines} lines"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_folder_has_more_modules_than_a_reader_takes_in(folder):
    folders = {path.parent for path in (ROOT / folder).rglob("*.py")}
    for each in folders:
        modules = [path for path in each.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MOST_MODULES, f"{each.relative_to(ROOT)} has {len(modules)} modules"
