"""Compare the checkpoint with the lowest validation loss and the last one, on the icon-style benchmark.

    python research/restune_tiny/prepare_icons.py data/icons --download --benchmark
    python -m benchmarks.icon_style.best_checkpoint --icons data/icons --work work/best \\
        --output benchmarks/results/best_checkpoint

Each run trains a skip tuner on 20 images of a style that the base does not know, and holds 4 out. It is long enough
to overfit, and its learning rate is constant. Both files of a run, `NAME.best.safetensors` and `NAME.safetensors`,
generate the same test concepts from the same noise, and the judges of the icon-style benchmark score the images.
Finished parts stay in the work folder, and an interrupted run resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.results_file import publish
from research.restune_tiny.icon_sources import DEVELOPMENT_SETS
from restune_diffusion import attach, load_tuner
from restune_diffusion.cli.run_demo import BASE
from restune_diffusion.evaluation import Lpips
from restune_diffusion.pipelines.load_base import load_base
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.callbacks.metrics_file import METRICS_FILE, read_metrics
from restune_diffusion.training.output_folder import best_file
from restune_diffusion.utils.atomic_write import atomic_write

from .data import IconData, to_images, write_tuning_images
from .judges import Judges, load_judges
from .runner import read_strip
from .sampling import ImageSampler

SEEDS = (0, 1, 2)
FILES = ("best", "last")
SETTINGS: dict[str, Any] = {
    "tuner": "skip",
    "steps": 600,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "checkpoint_every": 100,
    "checkpoints_kept": 1,
    "keep": "best",
    "log_with": "none",
    "resume": True,
}
HELD_OUT, LOSS_EVERY = 4, 50
INFERENCE_STEPS, GUIDANCE = 10, 4.0
SCORES = {"style_accuracy": "style", "top1": "content, top 1", "top5": "content, top 5", "lpips": "LPIPS"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """Runs of all styles and seeds, with their samples and scores.

    Args:
        icons: folder written by `research/restune_tiny/prepare_icons.py --benchmark`.
        work: folder of intermediate results.
        judges_folder: folder of the judges, which are trained if it has none.
        judge_epochs: epochs of the concept judge.
        concepts: number of test concepts.
    """

    icons: Path
    work: Path
    judges_folder: Path
    judge_epochs: int
    concepts: int

    @cached_property
    def pipeline(self) -> Any:
        """The frozen base."""
        pipeline = load_base(str(BASE), torch.float32)
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            module.requires_grad_(False)
        return pipeline

    @cached_property
    def data(self) -> IconData:
        """The icon sets."""
        return IconData(self.icons)

    @cached_property
    def judges(self) -> Judges:
        """Classifiers of concept and style."""
        return load_judges(self.data, self.pipeline.vae, self.judges_folder, epochs=self.judge_epochs)

    @cached_property
    def lpips(self) -> Lpips:
        """The network of LPIPS."""
        return Lpips()

    @property
    def test(self) -> list[str]:
        """The test concepts, none of which is among the training images."""
        stride = max(1, len(self.data.test) // self.concepts)
        return self.data.test[::stride][: self.concepts]

    def run(self, style: str, seed: int) -> tuple[dict[str, Path], list[tuple[int, float]]]:
        """Train a tuner if that is not done; return its two files and the validation losses."""
        folder = self.work / f"{style}-seed{seed}"
        split = self.data.split(style, seed)
        images = write_tuning_images(self.data.styles[style], split.tuning, folder / "data")
        validation = {"holdout": HELD_OUT, "holdout_seed": seed, "loss_every": LOSS_EVERY}
        config = TrainConfig(
            base=str(BASE),
            data=images,
            output=folder / "run",
            name="style",
            seed=seed,
            validation=validation,
            **SETTINGS,
        )
        losses = read_metrics(config.output / METRICS_FILE).get("validation_loss", [])
        if not config.file.exists() or not losses or losses[-1][0] < SETTINGS["steps"]:
            train(config, pipeline=self.pipeline, verbose=False)
            losses = read_metrics(config.output / METRICS_FILE)["validation_loss"]
        return {"best": best_file(config), "last": config.file}, losses

    def samples(self, style: str, seed: int, name: str, file: Path | None) -> torch.Tensor:
        """Return an image of each test concept, generated or read from an earlier call; of the base without a file."""
        path = self.work / f"{style}-seed{seed}" / f"{name}-{self.concepts}.png"
        if not path.exists():
            prompts = [self.data.styles[style].prompt(concept) for concept in self.test]
            with attach(self.pipeline.unet, load_tuner(file)) if file is not None else nullcontext():
                images = ImageSampler(self.pipeline, INFERENCE_STEPS, GUIDANCE).generate(prompts, seed=seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as output:
                to_images(torch.cat(list(images), dim=1)[None])[0].save(output, format="PNG")
        return read_strip(path)

    def score(self, style: str, images: torch.Tensor) -> dict[str, float]:
        """Return the shares of images with the style and the concept, and LPIPS to the artist's images."""
        ranks = self.judges.concept_ranks(images, self.test)
        found = self.judges.style_of(images)
        true = self.data.styles[style].pixels(self.test)
        return {
            "style_accuracy": sum(name == style for name in found) / len(found),
            "top1": float((ranks < 1).float().mean()),
            "top5": float((ranks < 5).float().mean()),
            "lpips": float(torch.as_tensor(self.lpips(images, true)).mean()),
        }

    def rows(self, style: str, seed: int, *, scored: bool) -> list[Row]:
        """Compute the missing parts of a run and return its rows; without scores if `scored` is False."""
        files, losses = self.run(style, seed)
        by_step = dict(losses)
        steps = {"best": min(by_step, key=lambda step: by_step[step]), "last": max(by_step)}
        wanted: dict[str, Path | None] = {**({"base": None} if seed == SEEDS[0] else {}), **files}
        rows = []
        for name, file in wanted.items():
            images = self.samples(style, seed, name, file)
            row: Row = {"style": style, "seed": seed, "file": name, "step": steps.get(name, 0)}
            row["validation_loss"] = by_step[row["step"]]
            rows.append(row | (self.score(style, images) if scored else {}))
        return rows


def difference(rows: Sequence[Row], key: str) -> list[float]:
    """Return best minus last of each run."""
    runs = sorted({(row["style"], row["seed"]) for row in rows})
    value = {(row["style"], row["seed"], row["file"]): row[key] for row in rows}
    return [value[*run, "best"] - value[*run, "last"] for run in runs]


def table(rows: Sequence[Row]) -> list[str]:
    """Return the Markdown table: every run, the means of each style, and best minus last."""
    lines = [
        f"| style | seed | file | step | validation loss | {' | '.join(SCORES.values())} |",
        f"|{'---|' * (5 + len(SCORES))}",
    ]

    def line(style: str, seed: str, file: str, step: str, values: Sequence[str]) -> str:
        return f"| {' | '.join([style, seed, file, step, *values])} |"

    keys = ("validation_loss", *SCORES)
    for row in rows:
        shown = [f"{row[key]:.4f}" if key == "validation_loss" else f"{row[key]:.3f}" for key in keys]
        lines.append(line(row["style"], str(row["seed"]), row["file"], str(row["step"]), shown))
    for style in sorted({row["style"] for row in rows}):
        for file in FILES:
            own = [row for row in rows if row["style"] == style and row["file"] == file]
            means = [mean(row[key] for row in own) for key in keys]
            shown = [f"**{means[0]:.4f}**", *(f"**{value:.3f}**" for value in means[1:])]
            step = f"{mean(row['step'] for row in own):.0f}"
            lines.append(line(style, f"mean of {len(own)}", file, step, shown))
    spread = [difference(rows, key) for key in keys]
    if len(spread[0]) > 1:
        shown = [f"{mean(each):+.3f} ± {stdev(each):.3f}" for each in spread]
        lines.append(line("both", f"{len(spread[0])} runs", "best - last", "", shown))
    return lines


def main() -> None:
    """Compute the missing parts and write the table of the finished runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--icons", type=Path, required=True, help="folder written by prepare_icons.py --benchmark")
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate results")
    parser.add_argument("--judges", type=Path, help="folder of the judges (default: WORK/judges)")
    parser.add_argument("--judge-epochs", type=int, default=30, help="epochs of the concept judge (default: 30)")
    parser.add_argument("--concepts", type=int, default=40, help="number of test concepts (default: 40)")
    parser.add_argument(
        "--runs", type=int, default=len(DEVELOPMENT_SETS) * len(SEEDS), help="number of runs, in order"
    )
    parser.add_argument("--no-scores", action="store_true", help="train and generate, without the judges")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    judges = arguments.judges or arguments.work / "judges"
    study = Study(arguments.icons, arguments.work, judges, arguments.judge_epochs, arguments.concepts)
    rows: list[Row] = []
    for style, seed in [(style, seed) for seed in SEEDS for style in DEVELOPMENT_SETS][: arguments.runs]:
        rows += study.rows(style, seed, scored=not arguments.no_scores)
        print(rows[-2:], flush=True)
    if not arguments.no_scores:
        rows.sort(key=lambda row: (row["style"], row["seed"]))
        how = (
            f"skip tuner, {SETTINGS['steps']} steps, batch size {SETTINGS['batch_size']}, constant learning rate "
            f"{SETTINGS['learning_rate']:g}, 20 training and {HELD_OUT} held-out images, validation loss every "
            f"{LOSS_EVERY} steps, {len(study.test)} test concepts, {INFERENCE_STEPS} denoising steps, guidance "
            f"{GUIDANCE:g}, concept judge of {study.judge_epochs} epochs"
        )
        publish("benchmarks.icon_style.best_checkpoint", rows, table(rows), how, arguments.output)


if __name__ == "__main__":
    main()
