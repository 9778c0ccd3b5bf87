"""The oldest versions that pyproject.toml promises are those that CI tests."""

import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from ..conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def floors(lines):
    """Return the lowest version of each requirement that has one, by name."""
    found = {}
    for requirement in map(Requirement, lines):
        lowest = [Version(each.version) for each in requirement.specifier if each.operator == ">="]
        if lowest:
            (found[canonicalize_name(requirement.name)],) = lowest
    return found


def pins(name):
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    requirements = [Requirement(line) for line in lines if line]
    assert all([each.operator for each in one.specifier] == ["=="] for one in requirements)
    return {canonicalize_name(one.name): Version(next(iter(one.specifier)).version) for one in requirements}


def test_the_lowest_set_is_what_pyproject_promises():
    extras = PROJECT["optional-dependencies"]
    promised = floors(PROJECT["dependencies"])
    # No CPU build of the oldest torch is on the package index.
    del promised["torch"]
    promised |= floors([*extras["test"], *extras["tensorboard"], *extras["report"]])
    assert pins("constraints-lowest.txt") == promised


def test_the_pins_of_ci_are_within_what_pyproject_promises():
    extras = PROJECT["optional-dependencies"]
    promised = floors([*PROJECT["dependencies"], *(line for lines in extras.values() for line in lines)])
    current = pins("constraints.txt")
    checked = promised.keys() & current.keys()
    assert {"torch", "diffusers", "transformers", "peft"} <= checked
    assert {name for name in checked if current[name] < promised[name]} == set()
