"""The log of a run, `metrics.jsonl`: one JSON object of figures a line, each with its step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

METRICS_FILE = "metrics.jsonl"
"""Where a run writes its log, in its output folder."""

Series: TypeAlias = list[tuple[int, float]]
"""A figure, with the steps at which it was logged."""


def read_metrics(path: Path) -> dict[str, Series]:
    """Read the figures of all whole lines by name; the last line may just be written, and no line has every figure."""
    series: dict[str, Series] = {}
    for line in _lines(path):
        step = line.get("step")
        if not isinstance(step, int):
            continue
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                series.setdefault(name, []).append((step, float(value)))
    return series


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    text = path.read_bytes().decode(errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict):
            yield values
