"""Writes the HTML page about a training run or a sweep."""

from __future__ import annotations

from pathlib import Path

from ...utils.atomic_write import atomic_write
from .curves import import_matplotlib
from .page import render
from .run_folder import read_run_folder
from .sweep_page import render_sweep, runs_of_sweep


def write_report(folder: Path | str, output: Path | None = None) -> Path:
    """Write a self-contained HTML report of a training run, or of a sweep.

    Args:
        folder: output folder of the run or sweep, which may be unfinished.
        output: path of the page; `report.html` in the folder by default.

    Returns:
        The path of the page.

    Raises:
        RestuneError: if the folder is not the output folder of a run or a sweep, or matplotlib is not installed.
        TunerFileError: if the page cannot be written.
    """
    import_matplotlib()
    folder = Path(folder)
    runs = runs_of_sweep(folder)
    page = render_sweep(folder, runs) if runs else render(read_run_folder(folder))
    path = output if output is not None else folder / "report.html"
    with atomic_write(path) as file:
        file.write(page.encode())
    return path
