"""The stage that plots how another one went."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from research.restune_tiny.parts import log


@dataclass(frozen=True)
class Plot:
    """What there is to see of a stage.

    Args:
        seen: what it is shown, the label of the horizontal axis.
        panels: labels of the numbers to plot, by their key in the log.
    """

    seen: str
    panels: dict[str, str]


_PICTURES = Plot(
    "pictures seen", {"loss": "loss\n(colours and outlines)", "l1": "error\n(mean over colours from -1 to 1)"}
)
PLOTS = {
    "vae": _PICTURES,
    "text": Plot(
        "captions seen",
        {"error": "error\n(mean square, expected latents)", "match": "loss\n(which caption for which picture)"},
    ),
    "unet": Plot(
        "noisy latents seen",
        {"loss": "loss\n(faint noise counts less)", "error": "error\n(mean square, all noise alike)"},
    ),
    "decoder": _PICTURES,
}


def images_seen(entries: list[dict[str, float]]) -> npt.NDArray[np.float64]:
    """How many pictures had been shown when each entry was written."""
    steps = np.diff([entry["step"] for entry in entries], prepend=0)
    return np.cumsum(steps * np.array([entry["images_per_step"] for entry in entries]), dtype=np.float64)


def running_mean(values: npt.NDArray[np.float64], reach: int) -> npt.NDArray[np.float64]:
    """The mean of each value and up to `reach` neighbours on either side.

    The first values fall steeply, so there are never more neighbours after than before; the last ones are level, so
    there the neighbours before stay, and no single value is the end of the curve.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    before = np.minimum(reach, places)
    after = np.minimum(before, places[::-1])
    means: npt.NDArray[np.float64] = (sums[places + after + 1] - sums[places - before]) / (before + after + 1)
    return means


def draw_curve(arguments: argparse.Namespace) -> None:
    """Plot loss and error over the pictures seen, as measured and as a running mean.

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
        raise SystemExit(f"There is nothing to plot: the stage `{arguments.trained}` has written no {path}.")
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
