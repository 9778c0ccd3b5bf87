"""A training stage's log: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path


def append(path: Path, entry: dict[str, float]) -> None:
    """Add an entry; a reader sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", buffering=1) as file:
        file.write(json.dumps(entry) + "\n")


def read(path: Path) -> list[dict[str, float]]:
    """All entries by step, of each step the last: a run that was resumed goes over some steps again."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    latest = {entry["step"]: entry for entry in entries}
    return [latest[step] for step in sorted(latest)]
