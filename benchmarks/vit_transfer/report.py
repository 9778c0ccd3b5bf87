"""Write what was measured as Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.icon_style.report import mean_and_spread
from restune_diffusion.utils.atomic_write import atomic_write

Row = dict[str, Any]


def transfer_table(rows: Sequence[Row]) -> str:
    """One line a method: test accuracy by task over seeds, their mean, what is trained and what training keeps."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = [
        f"| method | {' | '.join(tasks)} | mean | parameters | kept for backward, KiB | learning rates |",
        "|---" * (len(tasks) + 5) + "|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {task: [row for row in rows if (row["method"], row["task"]) == (method, task)] for task in tasks}
        if not all(own.values()):
            continue
        cells = [mean_and_spread([100 * row["test"] for row in own[task]], 1) for task in tasks]
        means = [sum(row["test"] for row in own[task]) / len(own[task]) for task in tasks]
        first = own[tasks[0]][0]
        rates = " / ".join(f"{own[task][0]['rate']:g}" for task in tasks)
        cells += [f"{100 * sum(means) / len(means):.1f}", f"{first['beside_head']:,}", f"{first['kept'] / 1024:,.0f}"]
        lines.append(f"| {method} | {' | '.join(cells)} | {rates} |")
    return "\n".join(lines)


def together_table(rows: Sequence[Row]) -> str:
    """One line for each number of tasks."""
    lines = ["| tasks | batch | logits equal to the bit | one pass, ms | a pass each, ms | ratio |", "|---" * 6 + "|"]
    for row in rows:
        times = f"{row['one_pass_ms']:.1f} | {row['a_pass_each_ms']:.1f} | {row['ratio']:.2f}"
        lines.append(f"| {row['tasks']} | {row['batch']} | {'yes' if row['equal'] else 'NO'} | {times} |")
    return "\n".join(lines)


def write_report(out: Path, facts: dict[str, Any], rows: Sequence[Row], shared: Sequence[Row]) -> None:
    """Write `OUT.md` and `OUT.json`; a note that a person added below the last line of a former report is kept."""
    markdown = out.with_suffix(".md")
    former = markdown.read_text() if markdown.exists() else ""
    note = former[former.index(NOTE) :] if NOTE in former else f"{NOTE}\n"
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    text = "\n\n".join(
        [
            "# One vision transformer, several tasks",
            facts["about"],
            "Test accuracy in percent (mean and standard deviation over seeds):",
            transfer_table(rows),
            LEGEND,
            "## One pass for all tasks",
            together_table(shared),
            "Bypass tuners as trained above. Processor time, median of repeats in turns in one process and thread.",
            f"`{facts['command']}` on {facts['machine']}; {versions}.",
            note,
        ]
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(markdown) as file:
        file.write(text.encode())
    whole = {**facts, "rows": list(rows), "together": list(shared)}
    with atomic_write(out.with_suffix(".json")) as file:
        file.write((json.dumps(whole, indent=1) + "\n").encode())


NOTE = "## What it says"
LEGEND = """\
- **parameters**: trained beside the head. **kept for backward**: bytes that autograd keeps of one training batch,
  parameters left out, counted for the first task.
- **bypass without tuners**: the paper's chain with H and V the identity: a learned average of all layers.
- **learning rates**: chosen for each task by validation accuracy at seed 0, out of those in the JSON file.
- **style**: which of seven icon styles, two of which the backbone has never seen. **novel**: concepts that
  pretraining left out, learnt in four styles, tested in two unseen ones.
  **colour**: main colour of a picture in `openmoji`, an unseen style."""
