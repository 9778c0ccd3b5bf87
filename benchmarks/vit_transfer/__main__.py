"""Transfer one small ViT to several tasks: compare linear probe, bypass, dual res, LoRA and full fine-tuning.

    python research/restune_tiny/prepare_icons.py data/icons --download --benchmark
    python -m benchmarks.vit_transfer --icons data/icons --work work/vit --output benchmarks/results/vit_transfer

The backbone and all finished rows stay in the work folder and are not computed again.
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
from .learning import Course, Learned, learn, sweep
from .methods import BYPASS, METHODS, Method
from .report import Row, write_report
from .tasks import TASKS, Task
from .together import Served, compare


@dataclass(frozen=True)
class Run:
    """Settings of a run."""

    icons: Path
    """Folder written by `research/restune_tiny/prepare_icons.py --benchmark`."""
    work: Path
    """Folder for the backbone and for finished rows; use a separate folder for other settings."""
    output: Path
    """Write OUTPUT.md and OUTPUT.json."""
    shape: Shape = field(default_factory=Shape)
    course: Course = field(default_factory=Course)
    seeds: int = 3
    tasks: tuple[str, ...] = tuple(TASKS)


class Rows:
    """Finished rows, saved in a JSON file.

    Args:
        path: JSON file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.all: list[Row] = json.loads(path.read_text()) if path.exists() else []

    def find(self, task: str, method: str, seed: int) -> Row | None:
        """Return a finished row, or None."""
        wanted = (task, method, seed)
        return next((row for row in self.all if (row["task"], row["method"], row["seed"]) == wanted), None)

    def add(self, row: Row) -> None:
        """Add a row and save the file."""
        self.all.append(row)
        with atomic_write(self._path) as file:
            file.write(json.dumps(self.all).encode())


def transfer(data: IconData, vit: Any, run: Run, rows: Rows) -> dict[str, Served]:
    """Train every method on every task and seed, and return the bypass tuners."""
    served: dict[str, Served] = {}
    for name in run.tasks:
        tasks = [TASKS[name](data, run.shape.image, seed) for seed in range(run.seeds)]
        for title, method in METHODS.items():
            for seed, learned in _learn_all(vit, title, method, name, tasks, run.course, rows):
                if title == BYPASS and learned.tuner is not None:
                    served[f"{name}-{seed}"] = Served(learned.tuner, learned.head)
    return served


def _learn_all(
    vit: Any, title: str, method: Method, name: str, tasks: Sequence[Task], course: Course, rows: Rows
) -> Iterator[tuple[int, Learned]]:
    """Train on the task of every seed, at the best learning rate of the first seed; finished rows are skipped.

    The bypass is trained again even if its row is finished, because its tuner is needed.
    """
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
        learned = done[seed] if seed in done else learn(vit, method, task, rate, seed, course)
        if not known:
            rows.add(_row(name, title, seed, task, learned) | {"rate": rate, "tried": tried})
        yield seed, learned


def _row(name: str, title: str, seed: int, task: Task, learned: Learned) -> Row:
    print(f"{name:8}{title:28} seed {seed}  test {100 * learned.test:.1f}", flush=True)
    return {
        "task": name,
        "method": title,
        "seed": seed,
        "validation": learned.validation,
        "test": learned.test,
        "beside_head": learned.parameters - sum(p.numel() for p in learned.head.parameters()),
        "kept": learned.kept,
        "classes": task.classes,
        "pictures": [len(part.labels) for part in (task.train, task.validation, task.test)],
    }


def serve(vit: Any, served: dict[str, Served], data: IconData, run: Run) -> list[Row]:
    """Compare one shared forward pass with a forward pass per task, for the tasks of one seed and of all seeds."""
    images = TASKS[run.tasks[0]](data, run.shape.image, 0).test.pixels[: run.course.batch]
    first = {name: task for name, task in served.items() if name.endswith("-0")}
    return [compare(vit, tasks, images) for tasks in (first, served)]


def describe(data: IconData, model: Any, run: Run, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the description, command, machine and versions of the results."""
    shape, (concepts, shown) = run.shape, concept_rows(data)
    named = {style: recognized(model, data, style, shape) for style in (*PRETRAINING_SETS, *DEVELOPMENT_SETS)}
    sizes = {row["task"]: (row["classes"], *row["pictures"]) for row in rows}
    splits = "; ".join(f"{name}: {n} classes, {a} / {b} / {c}" for name, (n, a, b, c) in sizes.items())
    about = (
        f"A `ViTModel` of {shape.layers} layers of width {shape.width} on {shape.image} px images with patches of "
        f"{shape.patch} px, pretrained for {shape.steps} steps at batch size {shape.batch} to classify "
        f"{len(concepts)} concepts in {len(shown)} images of five icon styles. Its accuracy on these concepts is "
        + ", ".join(f"{100 * share:.0f}% in `{style}`" for style, share in named.items())
        + f" (the last two styles are unseen). Every method: {run.course.steps} steps at batch size "
        f"{run.course.batch}, AdamW, the same schedule and order of images. "
        f"Images for training / validation / test: {splits}."
    )
    return {"about": about, **environment(" ".join(["python -m benchmarks.vit_transfer", *sys.argv[1:]]))}


def main(run: Run) -> None:
    """Run the benchmark: pretraining, transfer, shared serving and report."""
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
