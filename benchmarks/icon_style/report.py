"""Markdown report, JSON file and image grids of the benchmark's rows."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from restune_diffusion.imaging.contact_sheet import labelled_grid
from restune_diffusion.utils.atomic_write import atomic_write

from .data import IconData, to_images
from .runner import Row, read_strip, slug

COLUMNS = {
    "kid": ("KID x1000 ↓", 1),
    "style_accuracy": ("style ↑", 3),
    "top1": ("top-1 ↑", 3),
    "top5": ("top-5 ↑", 3),
    "lpips": ("LPIPS ↓", 3),
    "similarity": ("Inception ↑", 3),
    "nearest_tuning": ("nearest tuning", 3),
    "drift": ("drift ↓", 3),
    "parameters": ("parameters", 0),
    "learning_rate": ("lr", None),
    "steps": ("steps", 0),
    "seconds": ("seconds", 0),
}
SUBJECT_COLUMNS = {
    "subject": ("subject ↑", 3),
    "true": ("true ↑", 3),
    "prompt": ("prompt ↑", 2),
    "leak": ("drift ↓", 3),
    "parameters": ("parameters", 0),
    "learning_rate": ("lr", None),
}
LEGEND = """\
- **KID**: kernel distance (x 1000) of Inception features to the true images of other concepts in this style.
- **style**: share of samples that the style classifier assigns to this style.
- **top-1, top-5**: accuracy of the concept classifier, which was not trained on this style.
- **LPIPS, Inception**: distance and cosine similarity to the true image of the concept.
- **nearest tuning**: mean Inception distance to the nearest tuning image; a value far below that of the true images
  means copying.
- **drift**: LPIPS between tuned model and base for prompts in the base's own styles.
- **seconds**: processor time of the optimizer steps (median times number of steps) in one thread, which excludes
  other programs. The comparison at equal time uses these seconds.
"""


def mean_and_spread(values: Sequence[float], digits: int | None) -> str:
    """Return `0.512 ± 0.013` over seeds (sample standard deviation), or the single value for one seed."""
    if digits is None:
        return " / ".join(dict.fromkeys(f"{value:g}" for value in values))
    average = statistics.fmean(values)
    text = f"{average:,.{digits}f}"
    if len(values) > 1 and digits:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


def table(rows: Sequence[Row], columns: dict[str, tuple[str, int | None]]) -> str:
    """Return a Markdown table with one line per method, averaged over its seeds."""
    used = {key: column for key, column in columns.items() if any(key in row for row in rows)}
    lines = [f"| method | {' | '.join(title for title, _ in used.values())} |", "|---" * (len(used) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        cells = [
            mean_and_spread([row[key] for row in own], digits) if all(key in row for row in own) else ""
            for key, (_, digits) in used.items()
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def style_grid(data: IconData, folder: Path, style: str, concepts: list[str], methods: Sequence[str]) -> Any:
    """Return a grid with a row per concept; columns: true image, base and each method (first seed, equal steps)."""
    # Evenly spaced, because the list is in alphabetical order.
    chosen = list(range(0, len(concepts), max(1, len(concepts) // 10)))[:10]
    strips = {"true image": data.styles[style].pixels(concepts)}
    strips["base"] = read_strip(folder / "drawings" / "base.png")
    for method in methods:
        strips[method] = read_strip(folder / "drawings" / f"{slug(method)}-steps.png")
    columns = [to_images(strip[chosen]) for strip in strips.values()]
    rows = [list(row) for row in zip(*columns, strict=True)]
    titles = [title.replace("attention", "attn").replace("feed-forward", "ff") for title in strips]
    return labelled_grid(rows, [concepts[index] for index in chosen], titles, cell=160)


def environment(command: str) -> dict[str, Any]:
    """Return the command, machine and versions of the results."""
    packages = ("torch", "diffusers", "transformers", "peft", "torchmetrics", "resvg_py")
    return {
        "command": command,
        "machine": f"{platform.machine()}, CPU, one thread a process, fp32, Python {platform.python_version()}",
        "versions": {name: version(name) for name in packages},
    }


def write_report(out: Path, rows: Sequence[Row], subject: Sequence[Row], facts: dict[str, Any]) -> None:
    """Write `report.md` and `report.json`."""
    out.mkdir(parents=True, exist_ok=True)
    parts = ["# Icon-style benchmark", facts["about"], LEGEND]
    for style in dict.fromkeys(row["style"] for row in rows):
        own = [row for row in rows if row["style"] == style]
        seeds = sorted({row["seed"] for row in own})
        parts.append(f"## `{style}`, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}")
        grid = f"grid-{style}.png"
        if (out / grid).exists():
            parts.append(f"![Rows: concepts. Columns: the true image, the base and every method]({grid})")
        tables = {
            "steps": "Equal steps",
            "time": "Equal time",
            "study": "Variants of the bypass and gradient depths, equal steps",
        }
        for key, title in tables.items():
            if any(row["table"] == key for row in own):
                shown = [row for row in own if row["table"] in ("both", key)]
                parts += [f"### {title}", table(shown, COLUMNS)]
    if subject:
        parts += ["## Subject", facts["subject"], table(subject, SUBJECT_COLUMNS)]
        if (out / "grid-subject.png").exists():
            parts.append("![Rows: prompts. Columns: the true image, the base and every method](grid-subject.png)")
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    parts.append(f"`{facts['command']}` on {facts['machine']}; {versions}.")
    with atomic_write(out / "report.md") as file:
        file.write(("\n\n".join(part.strip() for part in parts) + "\n").encode())
    content = {**facts, "rows": list(rows), "subject_rows": list(subject)}
    with atomic_write(out / "report.json") as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
