"""Plots of the page, as SVG files; without matplotlib there are none."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .rows import Row

_OURS, _OTHERS = "#2a6f97", "#adb5bd"
_PEERS = (
    "PEFT",
    "ms-swift",
    "ControlNet",
    "forward alone",
    "plain",
    "LoRA file",
    "the base",
    "python",
    "import ",
    "one tuner",
)


def _figure(width: float, height: float) -> Any:
    """Return a figure, or None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib

    # Without random ids and dates, so that equal rows give equal files.
    matplotlib.rcParams.update({"svg.hashsalt": "restune", "svg.fonttype": "none", "font.size": 9})
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def bars(rows: Sequence[Row], title: str, path: Path) -> bool:
    """Write horizontal bars of medians with their quartiles; return whether matplotlib is installed."""
    figure = _figure(7, 0.6 + 0.28 * len(rows))
    if figure is None:
        return False
    axes = figure.subplots()
    shown = list(reversed(rows))
    values = [row["seconds"] for row in shown]
    spread = [[row["seconds"] - row["low"] for row in shown], [row["high"] - row["seconds"] for row in shown]]
    colors = [_OTHERS if row["what"].startswith(_PEERS) else _OURS for row in shown]
    axes.barh([row["what"] for row in shown], values, color=colors, xerr=[[max(0, v) for v in s] for s in spread])
    axes.set_xlabel("seconds")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
    return True


def curves(groups: Mapping[str, Mapping[str, Row]], columns: Sequence[str], label: str, path: Path) -> bool:
    """Write a line for each contestant over the groups; return whether matplotlib is installed."""
    figure = _figure(6, 3.5)
    if figure is None:
        return False
    axes = figure.subplots()
    for column in columns:
        axes.plot(list(groups), [rows[column]["seconds"] for rows in groups.values()], marker="o", label=column)
    axes.set_xlabel(label)
    axes.set_ylabel("seconds a step")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
    return True


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
