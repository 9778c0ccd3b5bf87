"""The page of all benchmarks: targets with the measured figures, tables and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from restune_diffusion.utils.atomic_write import atomic_write

from . import generation, plots, startup, training
from .rows import Row, Rows

_NOT_YET = "not measured yet"


@dataclass(frozen=True)
class Target:
    """A figure to reach: the largest or smallest value, and why it is missed if it is."""

    what: str
    group: str
    row: str
    key: str
    limit: float
    peer: str | None = None
    at_least: bool = False
    unit: str = ""
    why: str = ""

    def value(self, rows: Rows) -> float | None:
        """Return the measured figure: of the row, or divided by that of a peer."""
        known = counted_rows() if self.group == _COUNTED else rows.get(self.group)
        if self.row not in known or (self.peer is not None and self.peer not in known):
            return None
        value = float(known[self.row][self.key])
        return value / float(known[self.peer][self.key]) if self.peer else value

    def line(self, rows: Rows) -> str:
        """Return a line of the table of targets."""
        value = self.value(rows)
        sign = ">=" if self.at_least else "<="
        scale = 1000 if self.unit == "ms" else 1
        if value is None:
            return f"| {self.what} | {sign} {self.limit:g}{_space(self.unit)} | {_NOT_YET} | |"
        good = value * scale >= self.limit if self.at_least else value * scale <= self.limit
        figure = f"{value * scale:.3g}{_space(self.unit)}"
        return f"| {self.what} | {sign} {self.limit:g}{_space(self.unit)} | {figure} | {_verdict(good, self.why)} |"


def _space(unit: str) -> str:
    return f" {unit}" if unit else ""


def _verdict(good: bool, why: str) -> str:
    return "met" if good else f"not met{': ' + why if why else ''}"


_STEP, _PASS, _COUNTED = "training", "generation", "counted"
_COUNTS = Path(__file__).parents[1] / "results" / "backward_memory.json"
_NOISE = "1.007 at 256 px in nine rounds ([table](generation.md)); at 128 px passes of one contestant differ by 6%"
TARGETS = (
    Target(
        "bypass: training step / forward alone", _STEP, training.BYPASS, "seconds", 1.05, training.LIMIT,
    ),
    Target("bypass: training step / LoRA r=16", _STEP, training.BYPASS, "ratio", 0.55),
    Target("bypass: kept for backward / LoRA r=16, 512 px", _COUNTED, "bypass, ratio 0.5 (default)", "ratio", 0.05),
    Target(
        "cached features: images/s / LoRA r=16", _STEP, training.FEATURES, "images_per_second", 50, training.PEER,
        at_least=True,
    ),
    Target("`style` preset: training step / LoRA r=16", _STEP, training.STYLE, "ratio", 0.65),
    Target("skip: training step / LoRA r=16", _STEP, training.SKIP, "ratio", 0.85),
    Target(
        "skip: kept for backward / LoRA r=16, 512 px", _COUNTED, "skip, ratio 1.0", "ratio", 0.65,
        why="the bottleneck, as wide as the feature, keeps two further tensors of its size at each skip",
    ),
    Target("skip, ratio 0.1: kept for backward / LoRA r=16, 512 px", _COUNTED, "skip, ratio 0.1", "ratio", 0.65),
    Target("skip in a forward pass / plain", _PASS, training.SKIP, "ratio", 1.02, why=_NOISE),
    Target("bypass in a forward pass / plain", _PASS, training.BYPASS, "ratio", 1.02),
    Target(
        f"a tuner for each of {generation.STYLES} images / one tuner for all", "own tuners",
        f"a tuner for each of {generation.STYLES} images", "ratio", 1.05,
    ),
    Target("hot swap of 40 MB", "swap", "hot swap from the cache", "seconds", 10, unit="ms"),
    Target(startup.IMPORT, "start-up", startup.IMPORT, "seconds", 0.1, unit="s"),
    Target(startup.HELP, "start-up", startup.HELP, "seconds", 0.5, unit="s"),
    Target(startup.INSPECT, "start-up", startup.INSPECT, "seconds", 1.0, unit="s"),
)  # fmt: skip


def counted_rows() -> dict[str, Row]:
    """Return the rows of `benchmarks.backward_memory` by method."""
    return {row["method"]: row for row in json.loads(_COUNTS.read_text())["rows"]}


def write_page(rows: Rows, output: Path) -> None:
    """Write the page and its plots from the rows that are finished."""
    facts = rows.facts
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    how = (
        "Times between CUDA events." if facts["device"] != "CPU" else
        "Processor times of one thread, because other programs used the same cores and wall-clock times would include "
        "them. They share caches and memory, so a median still moves by some percent: compare ratios, which are "
        "medians of the ratios within a round."
    )  # fmt: skip
    lines = [
        "# All benchmarks", "",
        "`python -m benchmarks.all` writes this page. Models have the size of Stable Diffusion 1.5 and random "
        f"weights, in fp32; images have {facts['pixels']} px where no other size is given. {how} Contestants run in "
        "turn in one process. The spread is from the first to the third quartile.", "",
        f"{facts['device']}, {facts['machine']}; {versions}.", "",
    ]  # fmt: skip
    if facts["dry"]:
        lines += ["**A dry run with small models: the figures mean nothing.**", ""]
    lines += ["## Targets", "", "| figure | target | measured | |", "|---|---|---|---|"]
    lines += [target.line(rows) for target in TARGETS]
    lines += [
        "| one tuner in generation, host time included, on a GPU | <= 1.1 | by `python -m benchmarks.cuda` | |", "",
    ]  # fmt: skip
    for title, group, text in _SECTIONS:
        if group in rows.groups:
            lines += [f"## {title}", "", text, "", *_table(rows.groups[group]), ""]
            if plots.bars(rows.groups[group], title, output / "plots" / f"{_slug(group)}.svg"):
                lines += [f"![{title}](plots/{_slug(group)}.svg)", ""]
    lines += _scaling(rows, output)
    lines += _counted()
    with atomic_write(output / "README.md") as file:
        file.write("\n".join(lines).rstrip().encode() + b"\n")


_SECTIONS = (
    (
        "Training step", "training",
        "Forward, backward, clipping of the gradient and AdamW, batch 1, without data. `ratio` is to PEFT's "
        "LoRA r=16. ms-swift's modules are those of its files, attached by hooks where its own classes attach them; "
        "its bypass reads the inputs of the up blocks and of the output head.",
    ),
    (
        "Forward pass", "generation",
        "One pass of the U-Net, batch 1, without gradients. `ratio` is to the plain U-Net.",
    ),
    ("A tuner for each image", "own tuners", "One pass of 8 images of 128 px with skip tuners of ratio 0.1."),
    (
        "Swap", "swap",
        "From the call to the last copied parameter, for a skip tuner and a LoRA of equal size in fp16.",
    ),
    (
        "Queue of styles", "queue",
        "Eight requests with a style each, one forward pass of a 128 px image a request; skip tuners of ratio 0.1.",
    ),
    ("Start-up", "start-up", "Processor time of a new process, user and system; files are in the page cache."),
)  # fmt: skip


def _table(rows: Sequence[Row]) -> list[str]:
    """Return a Markdown table with a column for each kind of value that the rows have."""
    memory = any("kept_bytes" in row for row in rows)
    head = "| what | median | spread | ratio |" + (
        " images/s | parameters | kept for backward | / LoRA r=16 |" * memory
    )
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for row in rows:
        median, low, high = (_time(row[key]) for key in ("seconds", "low", "high"))
        line = f"| {row['what']} | {median} | {low} to {high} | {row['ratio']:.3f} |"
        if memory:
            line += f" {row.get('images_per_second', 0):.2f} | {row['parameters'] / 1e6:.2f}M |"
            line += f" {row['kept_bytes'] / 2**20:.0f} MiB | {row['kept_ratio']:.3f} |"
        lines.append(line)
    return lines


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def _number(group: str) -> int:
    return int("".join(filter(str.isdigit, group)) or 0)


def _scaling(rows: Rows, output: Path) -> list[str]:
    """Return the section on scaling: ratios by the number of tuners, batch size, resolution and steps."""
    lines: list[str] = []
    tuners = [row for row in rows.groups.get("scaling, tuners", []) if row["what"].isdigit()]
    if tuners:
        lines += ["| tuners mixed on all images | pass / plain pass |", "|---|---|"]
        lines += [f"| {row['what']} | {row['ratio']:.3f} |" for row in tuners] + [""]
    for what, names in (("batch", "batch size"), ("px", "resolution, batch 1")):
        found = {
            group.removeprefix("scaling, "): rows.get(group)
            for group in sorted(rows.groups, key=_number)
            if group.startswith("scaling, ") and what in group
        }
        if found:
            columns = (training.LIMIT, training.BYPASS, training.SKIP, training.PEER)
            lines += [f"| {names} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
            for name, each in found.items():
                lines.append(f"| {name} | {' | '.join(_time(each[column]['seconds']) for column in columns)} |")
            lines.append("")
            path = output / "plots" / f"scaling-{what}.svg"
            if plots.curves({name: found[name] for name in found}, columns, names, path):
                lines += [f"![Training step by {names}](plots/{path.name})", ""]
    steps = {group.split()[1]: rows.get(group) for group in rows.groups if group.endswith(" steps")}
    if steps:
        lines += ["| denoising passes | plain | with a skip tuner | ratio |", "|---|---|---|---|"]
        lines += [
            f"| {count} | {_time(each[generation.PLAIN]['seconds'])} | {_time(each[training.SKIP]['seconds'])} "
            f"| {each[training.SKIP]['ratio']:.3f} |"
            for count, each in steps.items()
        ] + [""]
    text = "Tuners, batch sizes and steps at 128 px. Training steps as above, in seconds a step."
    return ["## Scaling", "", text, "", *lines] if lines else []


def _counted() -> list[str]:
    """Return the section on tables that other benchmarks write."""
    lines = ["## Counted and longer benchmarks", ""]
    lines += ["Kept for backward at 512 px, batch 1, fp32 ([table](backward_memory.md)):", ""]
    lines += ["| method | MiB | / LoRA r=16 |", "|---|---|---|"]
    lines += [f"| {name} | {row['MiB']:.0f} | {row['ratio']:.3f} |" for name, row in counted_rows().items()] + [""]
    return [
        *lines,
        "[Gradient depth](gradient_depth.md), [presets](preset_memory.md), [length of a preset](preset_length.md), "
        "[feature cache and sweep](feature_cache.md), [loading](load_tuner.md), "
        "[beside diffusers' script](training_lora.md), [icon style](icon_style_family/report.md), "
        "[vision transformer](vit_transfer.md).",
    ]


def _slug(group: str) -> str:
    return group.replace(",", "").replace(" ", "-")
