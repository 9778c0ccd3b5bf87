"""Transfer one small ViT to several tasks: linear probe, bypass, dual res, LoRA and full fine-tuning side by side.

    python research/restune_tiny/prepare_icons.py data/icons --download --benchmark
    python -m benchmarks.vit_transfer --icons data/icons --work work/vit --output benchmarks/results/vit_transfer

The backbone and every finished row stay in the work folder and are not computed again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.icon_style.data import IconData
from benchmarks.icon_style.report import environment
from research.restune_tiny.icon_sources import DEVELOPMENT_SETS, PRETRAINING_SETS
from restune_diffusion.utils.atomic_write import atomic_write

from .backbone import Shape, concept_rows, load_recognizer, recognized
from .learning import Course, Learnt, learn, sweep
from .methods import BYPASS, METHODS, Method
from .report import Row, write_report
from .tasks import TASKS, Task
from .together import Served, compare


@dataclass(frozen=True)
class Run:
    """What one run is made of."""

    icons: Path
    """Folder that `research/restune_tiny/prepare_icons.py --benchmark` wrote."""
    work: Path
    """Folder for the backbone and for finished rows; keep those of different settings apart."""
    output: Path
    """Write OUTPUT.md and OUTPUT.json."""
    shape: Shape = field(default_factory=Shape)
    course: Course = field(default_factory=Course)
    seeds: int = 3
    tasks: tuple[str, ...] = tuple(TASKS)


class Rows:
    """Finished rows, kept in a file.

    Args:
        path: JSON file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.all: list[Row] = json.loads(path.read_text()) if path.exists() else []

    def find(self, task: str, method: str, seed: int) -> Row | None:
        """Return a finished row."""
        wanted = (task, method, seed)
        return next((row for row in self.all if (row["task"], row["method"], row["seed"]) == wanted), None)

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.all.append(row)
        with atomic_write(self._path) as file:
            file.write(json.dumps(self.all).encode())


def transfer(data: IconData, vit: Any, run: Run, rows: Rows) -> dict[str, Served]:
    """Train every method on every task and seed; returns the bypass tuners."""
    served: dict[str, Served] = {}
    for name in run.tasks:
        tasks = [TASKS[name](data, run.shape.image, seed) for seed in range(run.seeds)]
        for title, method in METHODS.items():
            for seed, learnt in _learn_all(vit, title, method, name, tasks, run.course, rows):
                if title == BYPASS and learnt.tuner is not None:
                    served[f"{name}-{seed}"] = Served(learnt.tuner, learnt.head)
    return served


def _learn_all(
    vit: Any, title: str, method: Method, name: str, tasks: Sequence[Task], course: Course, rows: Rows
) -> Iterator[tuple[int, Learnt]]:
    """Learn each seed's task at the rate that is best on the first; where there is a row, the bypass alone again."""
    first, done = rows.find(name, title, 0), {}
    if first:
        rate, tried = first["rate"], first["tried"]
    else:
        results = sweep(vit, method, tasks[0], course)
        rate, tried = next(iter(results)), {str(rate): result.validation for rate, result in results.items()}
        done[0] = results[rate]
    for seed, task in enumerate(tasks):
        known = rows.find(name, title, seed)
        if known and title != BYPASS:
            continue
        learnt = done[seed] if seed in done else learn(vit, method, task, rate, seed, course)
        if not known:
            rows.add(_row(name, title, seed, task, learnt) | {"rate": rate, "tried": tried})
        yield seed, learnt


def _row(name: str, title: str, seed: int, task: Task, learnt: Learnt) -> Row:
    print(f"{name:8}{title:28} seed {seed}  test {100 * learnt.test:.1f}", flush=True)
    return {
        "task": name,
        "method": title,
        "seed": seed,
        "validation": learnt.validation,
        "test": learnt.test,
        "beside_head": learnt.parameters - sum(p.numel() for p in learnt.head.parameters()),
        "kept": learnt.kept,
        "classes": task.classes,
        "pictures": [len(part.labels) for part in (task.train, task.validation, task.test)],
    }


def serve(vit: Any, served: dict[str, Served], data: IconData, run: Run) -> list[Row]:
    """Compare one pass for the tasks of the first seed, and for those of all seeds, with a pass for each."""
    pictures = TASKS[run.tasks[0]](data, run.shape.image, 0).test.pixels[: run.course.batch]
    first = {name: task for name, task in served.items() if name.endswith("-0")}
    return [compare(vit, tasks, pictures) for tasks in (first, served)]


def describe(data: IconData, model: Any, run: Run, rows: Sequence[Row]) -> dict[str, Any]:
    """Collect the facts that the figures depend on."""
    shape, (concepts, shown) = run.shape, concept_rows(data)
    named = {style: recognized(model, data, style, shape) for style in (*PRETRAINING_SETS, *DEVELOPMENT_SETS)}
    sizes = {row["task"]: (row["classes"], *row["pictures"]) for row in rows}
    splits = "; ".join(f"{name}: {n} classes, {a} / {b} / {c}" for name, (n, a, b, c) in sizes.items())
    about = (
        f"A `ViTModel` of {shape.layers} layers of width {shape.width} on {shape.image} px pictures in patches of "
        f"{shape.patch}, pretrained for {shape.steps} steps of {shape.batch} to name {len(concepts)} concepts in "
        f"{len(shown)} pictures of five icon styles. Of these concepts it names "
        + ", ".join(f"{100 * share:.0f}% in `{style}`" for style, share in named.items())
        + f" (the last two styles it has not seen). Every method: {run.course.steps} steps of {run.course.batch} "
        "pictures, AdamW, the same schedule and order of pictures. "
        f"Pictures for training / validation / test: {splits}."
    )
    return {"about": about, **environment(" ".join(["python -m benchmarks.vit_transfer", *sys.argv[1:]]))}


def main(run: Run) -> None:
    """Pretrain, transfer, serve and report."""
    torch.set_num_threads(1)
    run.work.mkdir(parents=True, exist_ok=True)
    data, rows = IconData(run.icons), Rows(run.work / "rows.json")
    model = load_recognizer(data, run.shape, run.work)
    served = transfer(data, model.vit, run, rows)
    shared = serve(model.vit, served, data, run)
    write_report(run.output, describe(data, model, run, rows.all), rows.all, shared)
    print(run.output.with_suffix(".md").read_text())


if __name__ == "__main__":
    main(tyro.cli(Run, description=__doc__))
