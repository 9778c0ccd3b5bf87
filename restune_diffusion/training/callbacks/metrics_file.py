"""Log of a training run, `metrics.jsonl`: one JSON object per line, with the step and its metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

METRICS_FILE = "metrics.jsonl"
"""File name of the log in the output folder."""

Series: TypeAlias = list[tuple[int, float]]
"""Values of one metric, each with the step at which it was logged."""

_RENAMED = {"leak": "drift"}
"""Metric names in the logs of version 0.1, with their present names."""


def read_metrics(path: Path) -> dict[str, Series]:
    """Return the values of each metric by name.

    Incomplete lines, such as the last one of a run in progress, are skipped. Lines need not have every metric.
    """
    series: dict[str, Series] = {}
    for line in _lines(path):
        step = line.get("step")
        if not isinstance(step, int):
            continue
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                series.setdefault(_RENAMED.get(name, name), []).append((step, float(value)))
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
