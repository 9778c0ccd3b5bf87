"""Results of the suite: one line for each subject of a check, kept on disk after each check."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from restune_diffusion.utils.atomic_write import atomic_write

if TYPE_CHECKING:
    from .bench import Bench

Status: TypeAlias = Literal["passed", "failed", "measured", "not run"]


@dataclass(frozen=True)
class Result:
    """Result of a check on one subject; a `measured` one has a limit that is not judged here."""

    what: str
    status: Status
    value: str = ""
    limit: str = ""


@dataclass(frozen=True)
class Check:
    """One check of a part.

    Args:
        title: what holds if the check passes.
        run: function that yields the results.
        needs_cuda: whether it means nothing on a CPU.
    """

    title: str
    run: Callable[[Bench], Iterator[Result]]
    needs_cuda: bool = False


class CannotRun(Exception):
    """Raised by a check whose requirement, named by the message, is missing."""


def holds(what: str, passed: bool, value: str = "", limit: str = "") -> Result:
    """Return the result of a fact that is judged on every machine."""
    return Result(what, "passed" if passed else "failed", value, limit)


def at_most(what: str, value: float, limit: float, form: str = ".2e") -> Result:
    """Return the result of a number that is judged on every machine; NaN fails."""
    return holds(what, value <= limit, f"{value:{form}}", f"<= {limit:{form}}")


def ratio(bench: Bench, what: str, value: float, limit: float, *, at_least: bool = False, note: str = "") -> Result:
    """Return the result of a ratio of times or bytes, which is judged on a GPU alone."""
    status: Status = "passed" if (value >= limit if at_least else value <= limit) else "failed"
    shown = f"{value:.3f}{f' ({note})' if note else ''}"
    return Result(what, "measured" if bench.dry else status, shown, f"{'>=' if at_least else '<='} {limit:g}")


@dataclass
class Results:
    """Results of the parts that have run, in a JSON file that is written after each check.

    Args:
        path: the file; None keeps nothing.
        facts: machine and versions; results of others are dropped.
    """

    path: Path | None
    facts: Mapping[str, Any]
    parts: dict[str, dict[str, list[Result]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def load(self) -> None:
        """Read what an earlier run on this machine, with these versions, has kept."""
        if self.path is None or not self.path.exists():
            return
        kept = json.loads(self.path.read_text())
        if kept["facts"] != dict(self.facts):
            return
        self.seconds = kept["seconds"]
        self.parts = {
            part: {title: [Result(**row) for row in rows] for title, rows in checks.items()}
            for part, checks in kept["parts"].items()
        }

    def add(self, part: str, title: str, results: Sequence[Result], seconds: float) -> None:
        """Replace the results of a check, and write the file."""
        self.parts.setdefault(part, {})[title] = list(results)
        self.seconds[f"{part}: {title}"] = round(seconds, 1)
        if self.path is None:
            return
        parts = {
            name: {check: [asdict(row) for row in rows] for check, rows in checks.items()}
            for name, checks in self.parts.items()
        }
        content = {"facts": dict(self.facts), "seconds": self.seconds, "parts": parts}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())

    def count(self, status: Status) -> int:
        """Return how many results have a status."""
        return sum(row.status == status for checks in self.parts.values() for rows in checks.values() for row in rows)

    def page(self, command: str) -> str:
        """Return the Markdown page of all parts."""
        counts = ", ".join(f"{self.count(each)} {each}" for each in ("passed", "failed", "measured", "not run"))
        facts = "; ".join(f"{name} {value}" for name, value in self.facts.items() if name != "versions")
        versions = ", ".join(f"{name} {number}" for name, number in self.facts["versions"].items())
        lines = [
            "# Acceptance suite for a GPU",
            "",
            f"`{command}`",
            "",
            f"{counts}; {sum(self.seconds.values()):.0f} s.",
        ]
        lines += ["", f"{facts}; {versions}."]
        for part, checks in self.parts.items():
            lines += ["", f"## {part.capitalize()}", "", "| check | subject | value | limit | result |"]
            lines += ["|---|---|---|---|---|"]
            lines += [
                f"| {title} | {row.what} | {row.value} | {row.limit} | {row.status} |"
                for title, rows in checks.items()
                for row in rows
            ]
        return "\n".join(lines) + "\n"
