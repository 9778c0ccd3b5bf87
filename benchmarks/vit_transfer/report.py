"""Markdown and JSON report of the benchmark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.icon_style.report import mean_and_spread
from restune_diffusion.utils.atomic_write import atomic_write

Row = dict[str, Any]


def transfer_table(rows: Sequence[Row]) -> str:
    """Return a table with one line per method: test accuracy by task over seeds, mean, parameters, training memory."""
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
    """Return a table with one line for each number of tasks."""
    lines = [
        "| tasks | batch | bit-identical logits | shared pass, ms | separate passes, ms | ratio |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        times = f"{row['one_pass_ms']:.1f} | {row['a_pass_each_ms']:.1f} | {row['ratio']:.2f}"
        lines.append(f"| {row['tasks']} | {row['batch']} | {'yes' if row['equal'] else 'NO'} | {times} |")
    return "\n".join(lines)


def write_report(out: Path, facts: dict[str, Any], rows: Sequence[Row], shared: Sequence[Row]) -> None:
    """Write `OUT.md` and `OUT.json`; a note added by hand under the last heading of an earlier report is kept."""
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
            "## One forward pass for all tasks",
            together_table(shared),
            "Bypass tuners from the table above. Processor time, median of alternating repeats in one process and "
            "thread.",
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


NOTE = "## Interpretation"
LEGEND = """\
- **parameters**: trained parameters besides the head. **kept for backward**: bytes that autograd saves for one
  training batch, without parameters, counted for the first task.
- **bypass without tuners**: the paper's chain with H and V the identity: a learned average of all layers.
- **learning rates**: chosen for each task by validation accuracy at seed 0, from those in the JSON file.
- **style**: one of seven icon styles, two of them unseen by the backbone. **novel**: concepts held out of
  pretraining, learned in four styles, tested in two unseen styles.
  **colour**: main color of an image in `openmoji`, an unseen style."""
