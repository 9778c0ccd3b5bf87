"""Log of a training stage: one JSON object per line."""

from __future__ import annotations

import json
from pathlib import Path


def append(path: Path, entry: dict[str, float]) -> None:
    """Append an entry as one complete line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", buffering=1) as file:
        file.write(json.dumps(entry) + "\n")


def read(path: Path) -> list[dict[str, float]]:
    """Return the entries sorted by step, only the last of each step: a resumed run repeats some steps."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    latest = {entry["step"]: entry for entry in entries}
    return [latest[step] for step in sorted(latest)]
