"""Plot of the training and validation loss as SVG, in the colors of the page's theme."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from ...training.callbacks.metrics_file import Series
from ...training.report.curves import running_mean, smoothing_window

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 14, 34
_POINTS = 400
_TICKS = 4


def loss_plot(training: Series, validation: Series, steps: int) -> str:
    """Return the plot of a run, or an empty text before there are two points.

    The line of the training loss is a running mean, because losses of single steps vary by their random timesteps.

    Args:
        training: loss of each step.
        validation: loss of the held-out images.
        steps: number of steps of the whole run.
    """
    if len(training) < 2:
        return ""
    numbers = np.array([step for step, _ in training])
    values = np.array([value for _, value in training], dtype=np.float64)
    smooth = running_mean(values, smoothing_window(len(values)))
    shown = np.unique(np.linspace(0, len(numbers) - 1, _POINTS).astype(int))
    others = [value for _, value in validation]
    low = min(float(smooth.min()), float(np.quantile(values, 0.02)), *others)
    high = max(float(smooth.max()), float(np.quantile(values, 0.98)), *others)
    frame = _Frame(max(steps, int(numbers[-1])), low, high)
    raw = frame.line([(int(numbers[each]), float(values[each])) for each in shown], "raw")
    mean = frame.line([(int(numbers[each]), float(smooth[each])) for each in shown], "mean")
    held_out = frame.line(validation, "held-out", marked=True) if validation else ""
    label = f"Training loss by step: {smooth[0]:.3f} at the start, {smooth[-1]:.3f} at step {numbers[-1]}"
    if validation:
        label += f"; validation loss {validation[0][1]:.3f} at the start, {validation[-1][1]:.3f} now"
    legend = '<span class="key mean">training images, running mean</span>'
    legend += '<span class="key held-out">held-out images</span>' if validation else ""
    return (
        f'<figure class="loss-plot"><figcaption>{legend}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{frame.axes()}{raw}{mean}{held_out}</svg></figure>"
    )


class _Frame:
    """Coordinates of the plot.

    Args:
        steps: last step of the axis.
        low: lowest value.
        high: highest value.
    """

    def __init__(self, steps: int, low: float, high: float) -> None:
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        self._steps, self._low, self._high = steps, low - margin, high + margin

    def line(self, points: Sequence[tuple[int, float]], name: str, *, marked: bool = False) -> str:
        places = [(self._x(step), self._y(value)) for step, value in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dots = "".join(f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places)
        return f'<polyline class="{name}" points="{path}"/>{dots if marked else ""}'

    def axes(self) -> str:
        parts = []
        for value in np.linspace(self._low, self._high, _TICKS + 2)[1:-1]:
            y = self._y(float(value))
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        for number in range(_TICKS + 1):
            step = round(self._steps * number / _TICKS)
            anchor = "end" if number == _TICKS else "middle"
            parts.append(f'<text x="{self._x(step):.1f}" y="{_HEIGHT - 14}" text-anchor="{anchor}">{step}</text>')
        return "".join(parts)

    def _x(self, step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / max(1, self._steps)

    def _y(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - min(1.0, max(0.0, share)))
