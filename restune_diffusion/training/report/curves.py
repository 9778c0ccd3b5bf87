"""Curves of metrics by step, as SVG for an HTML page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...utils.errors import RestuneError

# More points are not visible on a screen.
_POINTS = 800
_SIZE = 5.6, 2.7
_RAW, _SMOOTH, _OTHER = "#c3cfdf", "#1f4e8c", "#c8641b"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "restune",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a94a3",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6eaf0",
    "xtick.color": "#4a5462",
    "ytick.color": "#4a5462",
}

Series = Sequence[tuple[int, float]]


def smoothing_window(points: int) -> int:
    """Return the number of points in the running mean of a curve with this number of points."""
    return max(1, min(50, points // 8))


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the mean of each value and the values before it, at most `window` values."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def raw_and_smooth(series: Series, label: str, beside: Mapping[str, Series] | None = None) -> str:
    """Draw a noisy metric in a pale color, and its running mean on top.

    Args:
        series: the metric.
        label: description of the plot.
        beside: metrics without noise by name, drawn as they are; the plot then has a legend.
    """
    steps, values = _arrays(series)
    smooth = running_mean(values, smoothing_window(len(values)))
    shown = [smooth, np.quantile(values, [0.01, 0.99])]
    with _Figure(label) as figure:
        figure.line(steps, values, color=_RAW, linewidth=0.7)
        figure.line(steps, smooth, color=_SMOOTH, linewidth=1.7, label="training images")
        for name, each in (beside or {}).items():
            other_steps, other = _arrays(each)
            figure.line(other_steps, other, color=_OTHER, linewidth=1.7, marker="o", ms=3, label=name)
            shown.append(other)
        figure.limit(np.concatenate(shown))
        if beside:
            figure.legend(1 + len(beside))
    return figure.svg


def plain(series: Series, label: str) -> str:
    """Draw a metric without smoothing; up to 40 points have markers."""
    steps, values = _arrays(series)
    with _Figure(label) as figure:
        figure.line(steps, values, color=_SMOOTH, linewidth=1.7, marker="o" if len(values) <= 40 else None, ms=3)
    return figure.svg


def several(series: Mapping[str, Series], label: str, *, columns: int | None = None) -> str:
    """Draw the running means of several metrics, with colors from dark to bright in their order.

    The legend has one row, or `columns` columns.
    """
    import_matplotlib()
    from matplotlib import colormaps

    colors = colormaps["viridis"](np.linspace(0, 0.88, len(series)))
    shown = []
    with _Figure(label) as figure:
        for (name, each), color in zip(series.items(), colors, strict=True):
            steps, values = _arrays(each)
            shown.append(running_mean(values, smoothing_window(len(values))))
            figure.line(steps, shown[-1], color=color, linewidth=1.5, label=name)
        figure.limit(np.concatenate(shown))
        figure.legend(columns or len(series))
    return figure.svg


def import_matplotlib() -> Any:
    """Return matplotlib.

    Raises:
        RestuneError: if it is not installed; the message names the extra.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise RestuneError(
            "The report's curves need matplotlib; run pip install 'restune-diffusion[report]'."
        ) from error
    return matplotlib


class _Figure:
    """Context manager for a plot by step; afterward `svg` has the SVG text, which scales to its container."""

    def __init__(self, label: str) -> None:
        self.svg = ""
        self._label = label

    def __enter__(self) -> _Figure:
        matplotlib = import_matplotlib()
        self._context = matplotlib.rc_context(_STYLE)
        self._context.__enter__()
        self._figure = matplotlib.figure.Figure(figsize=_SIZE, layout="constrained")
        self._axes = self._figure.add_subplot()
        self._axes.set_xlabel("step", color="#4a5462")
        return self

    def line(self, steps: NDArray[np.int64], values: NDArray[np.float64], **style: Any) -> None:
        chosen = np.unique(np.linspace(0, len(steps) - 1, _POINTS).astype(int))
        self._axes.plot(steps[chosen], values[chosen], solid_joinstyle="round", **style)

    def limit(self, values: NDArray[np.float64]) -> None:
        low, high = float(values.min()), float(values.max())
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        self._axes.set_ylim(low - margin, high + margin)

    def legend(self, columns: int) -> None:
        self._axes.legend(
            ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8, handlelength=1.2,
            columnspacing=1.0, borderaxespad=0.2,
        )  # fmt: skip

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:
                self.svg = self._to_svg()
        finally:
            self._context.__exit__(*error)

    def _to_svg(self) -> str:
        file = io.StringIO()
        self._figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
        text = file.getvalue()
        body = text[text.index("<svg") :]
        width, height = (72 * side for side in _SIZE)
        _, _, rest = body.partition(">")
        head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{self._label}"'
        return f'{head} xmlns:xlink="http://www.w3.org/1999/xlink">{rest}'


def _arrays(series: Series) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    return np.array([step for step, _ in series]), np.array([value for _, value in series], dtype=np.float64)
