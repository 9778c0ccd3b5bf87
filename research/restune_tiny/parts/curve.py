"""Plot the training curves of a stage."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from research.restune_tiny.parts import log


@dataclass(frozen=True)
class Plot:
    """Plot of a stage's log.

    Args:
        seen: label of the horizontal axis, the training samples used.
        panels: labels of the plotted values, by their key in the log.
    """

    seen: str
    panels: dict[str, str]


_PICTURES = Plot(
    "images seen", {"loss": "loss\n(colors and outlines)", "l1": "error\n(mean over colors from -1 to 1)"}
)
PLOTS = {
    "vae": _PICTURES,
    "text": Plot(
        "captions seen",
        {"error": "error\n(mean square, expected latents)", "match": "loss\n(matching captions to images)"},
    ),
    "unet": Plot(
        "noisy latents seen",
        {"loss": "loss\n(low noise has less weight)", "error": "error\n(mean square, equal weights)"},
    ),
    "decoder": _PICTURES,
}


def images_seen(entries: list[dict[str, float]]) -> npt.NDArray[np.float64]:
    """Return the cumulative number of images at each log entry."""
    steps = np.diff([entry["step"] for entry in entries], prepend=0)
    return np.cumsum(steps * np.array([entry["images_per_step"] for entry in entries]), dtype=np.float64)


def running_mean(values: npt.NDArray[np.float64], reach: int) -> npt.NDArray[np.float64]:
    """Return the mean of each value and up to `reach` neighbors on either side.

    The number of later neighbors never exceeds the number of earlier ones, because the first values fall steeply. The
    last values are level and keep all earlier neighbors, so the curve does not end in a single value.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    before = np.minimum(reach, places)
    after = np.minimum(before, places[::-1])
    means: npt.NDArray[np.float64] = (sums[places + after + 1] - sums[places - before]) / (before + after + 1)
    return means


def draw_curve(arguments: argparse.Namespace) -> None:
    """Plot loss and error over the number of images, as measured and as a running mean.

    Raises:
        SystemExit: if matplotlib is not installed, or the stage has written no log.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise SystemExit("Plotting needs matplotlib, which is not installed: pip install matplotlib") from error
    plot, path = PLOTS[arguments.trained], arguments.work / f"{arguments.trained}-log.jsonl"
    entries = log.read(path) if path.exists() else []
    if not entries:
        raise SystemExit(f"There is no log {path} to plot; run the stage `{arguments.trained}` first.")
    seen = images_seen(entries)
    figure = Figure(figsize=(8, 3 * len(plot.panels)), layout="constrained")
    panels = figure.subplots(len(plot.panels), sharex=True)
    for axes, (key, label) in zip(panels, plot.panels.items(), strict=True):
        values = np.array([entry[key] for entry in entries])
        axes.plot(seen, values, color="#9db8d9", linewidth=0.8, label="as measured")
        axes.plot(seen, running_mean(values, len(values) // 25), color="#1f4e8c", linewidth=1.8, label="running mean")
        axes.set_ylim(bottom=0)
        axes.set_ylabel(label)
        axes.grid(color="#e4e4e4")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    panels[-1].set_xlabel(plot.seen)
    panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    figure.savefig(arguments.out, dpi=150)
