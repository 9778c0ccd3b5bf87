"""Measure the generalization aids on the icon-style benchmark: two styles, three seeds.

    python research/restune_tiny/prepare_icons.py data/icons --download --benchmark
    python -m benchmarks.aids --icons data/icons --work work/aids --output benchmarks/results/aids

Finished rows stay in the work folder and are not computed again. Learning rate and consistency are chosen with seed 0
of each style, by the denoising loss on 48 images that are not trained on.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.icon_style.data import IconData
from benchmarks.icon_style.judges import load_judges
from benchmarks.icon_style.methods import held_out_loss
from benchmarks.icon_style.report import environment, table
from benchmarks.icon_style.runner import Row, Settings, StyleRun, describe, slug
from benchmarks.icon_style.scores import Yardsticks, mean
from research.restune_tiny.icon_sources import DEVELOPMENT_SETS
from restune_diffusion.cli.quiet import quiet_libraries
from restune_diffusion.cli.run_demo import BASE
from restune_diffusion.evaluation import Lpips
from restune_diffusion.pipelines.load_base import load_base
from restune_diffusion.storage.tuner_file import load_tuner, save_tuner
from restune_diffusion.training.latents.batches import Batches
from restune_diffusion.utils.atomic_write import atomic_write

from .variants import (
    VARIANTS,
    Aid,
    Choice,
    Learner,
    Variant,
    loss_inside,
    losses_beside,
    train_beside,
    train_inside,
    with_tuner,
)

COMMAND = "python -m benchmarks.aids --icons data/icons --work work/aids --output benchmarks/results/aids"
TABLE = "aids"
UNTUNED = "base, not tuned"
COLUMNS = {
    "held_out": ("held-out loss ↓", 4),
    "style_accuracy": ("style ↑", 2),
    "top1": ("top-1 ↑", 2),
    "top5": ("top-5 ↑", 2),
    "lpips": ("LPIPS ↓", 3),
    "drift": ("drift ↓", 3),
    "parameters": ("parameters", 0),
    "learning_rate": ("lr", None),
    "weight": ("lambda", None),
}


@dataclass(frozen=True)
class Run:
    """Settings of a run."""

    icons: Path
    """Folder written by `research/restune_tiny/prepare_icons.py --benchmark`."""
    work: Path
    """Folder for finished rows; use a separate folder for other settings."""
    output: Path | None = None
    """Write OUTPUT.md and OUTPUT.json from the finished rows."""
    judges: Path | None = None
    """Folder of the judges, if it is not the work folder."""
    judge_epochs: int = 30
    """Epochs for training the judges, if the folder has none."""
    styles: tuple[str, ...] = DEVELOPMENT_SETS
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 200
    concepts: int = 40
    """Number of test concepts."""
    drift_concepts: int = 1
    """Test concepts whose drift is measured, in each of the base's five styles."""
    inference_steps: int = 10
    only: tuple[str, ...] = ("*",)
    """Patterns of the names of the rows."""
    score: bool = True
    """Score the tuners; if not, only train them."""
    only_report: bool = False
    """Compute nothing."""

    def wants(self, name: str) -> bool:
        """Return whether a row is to be computed."""
        return any(fnmatch(name, only) for only in self.only)


class Study:
    """The rows of one style and seed.

    Args:
        run: settings.
        style: the styles' run of the icon-style benchmark, with its data, sampler and scorer.
    """

    def __init__(self, run: Run, style: StyleRun) -> None:
        self.run, self.style = run, style
        self.unet, self.objective, self.seed = style.pipeline.unet, style.objective, style.seed

    def train(self, variants: Sequence[Variant]) -> None:
        """Train the missing tuners of these variants."""
        untrained = [variant for variant in variants if not self._file(variant).exists()]
        beside = [variant for variant in untrained if variant.config.writes_at_out_alone]
        if beside:
            self._train_beside(beside)
        for variant in untrained:
            if variant not in beside:
                self._train_inside(variant)

    def score(self, variants: Sequence[Variant]) -> None:
        """Compute the missing rows of these variants and of the base."""
        if self.run.wants(UNTUNED):
            _say(self.style._row(UNTUNED, TABLE, self._base))
        for variant in variants:
            _say(self.style._row(variant.name, TABLE, partial(self._score, variant)))

    def _base(self) -> Row:
        loss = held_out_loss(self.unet, self.style.selection, self.objective)
        drawn = self.style._saved_samples("base", self.style.prompts, None)
        return self._judge(drawn) | {"held_out": loss, "drift": 0.0}

    def _judge(self, images: torch.Tensor) -> Row:
        """Score one image of each test concept."""
        style, yardsticks = self.style, self.style.yardsticks
        ranks = yardsticks.judges.concept_ranks(images, style.concepts)
        found = yardsticks.judges.style_of(images)
        return {
            "style_accuracy": sum(name == style.style for name in found) / len(found),
            "top1": mean(ranks < 1),
            "top5": mean(ranks < 5),
            "lpips": mean(yardsticks.lpips(images, style.data.styles[style.style].pixels(style.concepts))),
        }

    def _batches(self, size: int) -> Batches:
        style = self.style
        return Batches(
            style._cache("tuning", style.split.tuning),
            seed=self.seed,
            size=size,
            timesteps=self.objective.timesteps,
            caption_dropout=0.0,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )

    def _train_inside(self, variant: Variant) -> None:
        learners, losses, batches = [], [], self._batches(variant.batch)
        for choice in self._choices(variant):
            learner = Learner.of(choice, self.unet, self.seed, self.run.steps)
            train_inside(learner, self.unet, batches, self.objective, self.seed, self.run.steps)
            learners.append(learner)
            losses.append(loss_inside(learner, self.unet, self.style.selection, self.objective))
        self._keep(variant, learners, losses, 0.0)

    def _train_beside(self, variants: list[Variant]) -> None:
        choices = [choice for variant in variants for choice in self._choices(variant)]
        learners = [Learner.of(choice, self.unet, self.seed, self.run.steps) for choice in choices]
        batches = self._batches(variants[0].batch)
        shared = train_beside(learners, self.unet, batches, self.objective, self.seed, self.run.steps)
        losses = losses_beside(learners, self.unet, self.style.selection, self.objective)
        for variant in variants:
            own = [number for number, choice in enumerate(choices) if choice.variant == variant]
            self._keep(variant, [learners[n] for n in own], [losses[n] for n in own], shared)

    def _choices(self, variant: Variant) -> list[Choice]:
        """Return the choices of a variant: all with seed 0, then the best of these."""
        first = self._file(variant, seed=0).with_suffix(".json")
        if self.seed and first.exists():
            facts = json.loads(first.read_text())
            aid = Aid(facts["weight"], facts["sigma"]) if "weight" in facts else None
            return [Choice(variant, facts["learning_rate"], aid)]
        return Choice.all_of(variant)

    def _keep(self, variant: Variant, learners: list[Learner], losses: list[float], shared: float) -> None:
        """Save the tuner with the lowest held-out loss and its facts."""
        best = min(range(len(losses)), key=losses.__getitem__)
        learner, aid = learners[best], learners[best].choice.aid
        tried = {_described(each.choice): loss for each, loss in zip(learners, losses, strict=True)}
        facts: dict[str, Any] = {
            "held_out": losses[best],
            "learning_rate": learner.choice.rate,
            **({"weight": aid.weight, "sigma": aid.sigma, "distance": learner.distances[-1]} if aid else {}),
            "parameters": learner.tuner.num_parameters(),
            "steps": self.run.steps,
            "seconds": learner.seconds + shared,
            "tried": tried,
        }
        path = self._file(variant)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path.with_suffix(".json")) as file:
            file.write(json.dumps(facts, indent=1).encode())
        save_tuner(learner.tuner, path)
        print(f"{self.style.style} seed {self.seed} {variant.name}: {facts}", flush=True)

    def _score(self, variant: Variant) -> Row:
        path = self._file(variant)
        tuner = load_tuner(path)
        unet = with_tuner(self.unet, tuner)
        name = f"{slug(variant.name)}-{TABLE}"
        drawn = self.style._saved_samples(name, self.style.prompts, unet)
        old = self.style._saved_samples(f"{name}-old", self.style.old_prompts, unet)
        drift = mean(self.style.yardsticks.lpips(old, self.style.base_old_samples))
        return self._judge(drawn) | {"drift": drift} | json.loads(path.with_suffix(".json").read_text())

    def _file(self, variant: Variant, seed: int | None = None) -> Path:
        folder = self.style.folder.with_name(f"{self.style.style}-seed{self.seed if seed is None else seed}")
        return folder / "tuners" / f"{slug(variant.name)}.safetensors"


def _described(choice: Choice) -> str:
    aid = "" if choice.aid is None else f", lambda {choice.aid.weight:g}, sigma {choice.aid.sigma:g}"
    return f"lr {choice.rate:g}{aid}"


def _say(row: Row) -> None:
    print(f"{time.strftime('%H:%M:%S')} {time.process_time() / 60:.1f} min: {describe(row)}", flush=True)


def compute(run: Run) -> None:
    """Compute all missing rows."""
    pipeline = load_base(str(BASE), torch.float32)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.requires_grad_(False).eval()
    data = IconData(run.icons)
    yardsticks: Any = None
    if run.score:
        judges = load_judges(data, pipeline.vae, run.judges or run.work, epochs=run.judge_epochs)
        yardsticks = Yardsticks(None, Lpips(), judges)
    settings = Settings(
        steps=run.steps,
        inference_steps=run.inference_steps,
        concepts=run.concepts,
        drift_concepts=run.drift_concepts,
        sweep=False,
    )
    studies = [
        Study(run, StyleRun(pipeline, data, yardsticks, style, seed, settings, run.work))
        for seed in run.seeds
        for style in run.styles
    ]
    # The bypasses first, because they take less time.
    for beside in (True, False):
        chosen = [variant for variant in VARIANTS if run.wants(variant.name)]
        variants = [variant for variant in chosen if variant.config.writes_at_out_alone == beside]
        for study in studies:
            study.train(variants)
            if run.score:
                study.score(variants)


def report(run: Run) -> None:
    """Write the tables."""
    assert run.output is not None
    order = [UNTUNED, *(variant.name for variant in VARIANTS)]
    rows = [json.loads(path.read_text()) for path in sorted(run.work.glob(f"*-seed*/rows/*-{TABLE}.json"))]
    rows.sort(key=lambda row: (run.styles.index(row["style"]), order.index(row["method"]), row["seed"]))
    facts = environment(COMMAND)
    parts = [
        "# Generalization aids",
        f"24 images of a style that the base was not trained on, {run.steps} steps of 8 or 4; {run.concepts} "
        f"other concepts, {run.inference_steps} DDIM steps, guidance 4; mean and standard deviation over the seeds. "
        f"The learning rate is chosen with seed 0 of each style by the held-out loss, on 48 images that are not "
        f"trained on; that of skip is the one of docs/bypass.md. Lambda and sigma were "
        f"chosen once, with the bypass on `openmoji` and seed 0. The judges are those of the icon-style benchmark.",
    ]
    for style in dict.fromkeys(row["style"] for row in rows):
        own = [row for row in rows if row["style"] == style]
        seeds = sorted({row["seed"] for row in own})
        parts += [f"## `{style}`, seeds {', '.join(map(str, seeds))}", table(own, COLUMNS), *_pairs(own)]
        losses = _held_out(run, style)
        parts += ["Held-out loss of each seed:", losses]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    parts.append(f"`{facts['command']}` on {facts['machine']}; {versions}.")
    run.output.parent.mkdir(parents=True, exist_ok=True)
    run.output.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    shown = ("steps", "concepts", "drift_concepts", "inference_steps", "judge_epochs")
    content = {**facts, "settings": {name: getattr(run, name) for name in shown}, "rows": rows}
    run.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    print(run.output.with_suffix(".md"))


def _held_out(run: Run, style: str) -> str:
    """Return a table of the held-out loss of each trained tuner."""
    folders = [run.work / f"{style}-seed{seed}" / "tuners" for seed in run.seeds]
    lines = [f"| tuner | {' | '.join(f'seed {seed}' for seed in run.seeds)} |", "|---" * (len(folders) + 1) + "|"]
    for variant in VARIANTS:
        found = [folder / f"{slug(variant.name)}.json" for folder in folders]
        losses = [json.loads(path.read_text())["held_out"] if path.exists() else None for path in found]
        cells = ["" if loss is None else f"{loss:.4f}" for loss in losses]
        lines.append(f"| {variant.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _pairs(rows: list[Row]) -> list[str]:
    """Return the mean differences to the plain tuner of the same kind with the same seed."""
    found = {(row["method"], row["seed"]): row for row in rows}
    lines = ["| difference to the plain tuner, seed by seed | held-out loss | style | top-5 | LPIPS | drift |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for variant in VARIANTS:
        plain = "skip, batch 4" if variant.name.startswith("skip") else "bypass, ratio 1.25"
        seeds = [seed for name, seed in found if name == variant.name and (plain, seed) in found]
        if variant.name == plain or not seeds:
            continue
        cells = []
        for key, digits in (("held_out", 4), ("style_accuracy", 2), ("top5", 2), ("lpips", 3), ("drift", 3)):
            values = [found[variant.name, seed][key] - found[plain, seed][key] for seed in seeds]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):+.{digits}f}{spread}")
        lines.append(f"| {variant.name} | {' | '.join(cells)} |")
    return ["\n".join(lines)] if len(lines) > 2 else []


def main() -> None:
    """Run the command line."""
    quiet_libraries()
    torch.set_num_threads(1)
    run = tyro.cli(Run, prog="python -m benchmarks.aids", description=__doc__)
    if not run.only_report:
        compute(run)
    if run.output is not None:
        report(run)


if __name__ == "__main__":
    main()
