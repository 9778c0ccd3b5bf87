"""Share of a LoRA's gain that arrives in a bypass and a skip tuner distilled from it without its images.

    python research/restune_tiny/prepare_icons.py data/icons --download --benchmark
    python -m benchmarks.distillation --icons data/icons --work work/distillation run openmoji
    python -m benchmarks.distillation --icons data/icons --work work/distillation run fluent-emoji
    python -m benchmarks.distillation --icons data/icons --work work/distillation table --judges work \
        --output benchmarks/results/distillation

For each style, a LoRA is trained on 24 images, written in kohya's layout, and given as `--teacher`. The students see
prompts of other concepts, and none of the images. For comparison the same tuners are trained on the 24 images, with as
many steps. The held-out loss is the denoising loss on other images of the style. The samples are of test concepts,
which are neither among the images nor among the prompts. Finished stages stay in the work folder, so that a run can be
continued.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.icon_style.data import IconData, to_images, write_tuning_images
from benchmarks.icon_style.judges import Judges, load_judges
from benchmarks.icon_style.methods import held_out_loss
from benchmarks.icon_style.runner import read_strip
from benchmarks.icon_style.sampling import ImageSampler
from benchmarks.results_file import publish
from restune_diffusion import attach
from restune_diffusion.cli.run_demo import BASE
from restune_diffusion.conversion import convert, load_any
from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.evaluation import Lpips
from restune_diffusion.pipelines.load_base import load_base
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.latents.cache import build_cache
from restune_diffusion.training.losses.objective import Objective
from restune_diffusion.utils.atomic_write import atomic_write

Row = dict[str, Any]
LORA: dict[str, Any] = {
    "tuner": "res",
    "res": {"self_attention": "lora", "cross_attention": "lora", "feed_forward": None, "width": 16},
    "learning_rate": 5e-4,
}
STUDENTS: dict[str, dict[str, Any]] = {
    "bypass": {"tuner": "bypass", "learning_rate": 5e-3},
    "skip": {"tuner": "skip", "learning_rate": 1e-3},
}
ROWS = (
    "base",
    "LoRA, the teacher",
    *(f"{name}, distilled" for name in STUDENTS),
    *(f"{name}, trained on the images" for name in STUDENTS),
)


@dataclass(frozen=True)
class Run:
    """Run of one style and one seed; `concepts` is the number of test concepts of the samples."""

    icons: Path
    work: Path
    style: str
    seed: int = 0
    steps: int = 250
    latents: int = 96
    concepts: int = 33

    @property
    def folder(self) -> Path:
        """Folder of the stages."""
        return self.work / f"{self.style}-seed{self.seed}"

    def compute(self, only: str = "*") -> None:
        """Compute the missing stages of the rows whose names match a pattern."""
        pipeline = load_base(str(BASE), torch.float32)
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            module.requires_grad_(False)
        data = IconData(self.icons)
        own, split = data.styles[self.style], data.split(self.style, self.seed)
        images = write_tuning_images(own, split.tuning, self.folder / "images")
        held_out = write_tuning_images(own, split.selection[:24], self.folder / "held-out")
        cache = build_cache(pipeline, load_samples(find_examples(held_out), 64))
        sampler, objective = ImageSampler(pipeline, 12, 4.0), Objective(pipeline.scheduler)
        files: dict[str, Callable[[], Path | None]] = {
            "base": lambda: None,
            "LoRA, the teacher": lambda: self._teacher(images),
            **{f"{name}, distilled": self._student(name, images, split.reference) for name in STUDENTS},
            **{f"{name}, trained on the images": self._student(name, images) for name in STUDENTS},
        }
        for name in fnmatch.filter(ROWS, only):
            row_path, strip = self.path(name, "json"), self.path(name, "png")
            if row_path.exists() and strip.exists():
                continue
            file = files[name]()
            tuner = load_any(file, base=str(BASE)) if file is not None else None
            with attach(pipeline.unet, tuner) if tuner is not None else nullcontext():
                loss = held_out_loss(pipeline.unet, cache, objective)
                prompts = [own.prompt(concept) for concept in self.tested(data)]
                found = sampler.generate(prompts, seed=self.seed)
            with atomic_write(strip) as opened:
                to_images(torch.cat(list(found), dim=1)[None])[0].save(opened, format="PNG")
            seconds = json.loads(file.with_name("seconds.json").read_text()) if file is not None else None
            row = {"style": self.style, "seed": self.seed, "method": name, "held_out_loss": loss, "seconds": seconds}
            with atomic_write(row_path) as opened:
                opened.write(json.dumps(row).encode())
            print(row, flush=True)

    def tested(self, data: IconData) -> list[str]:
        """Return the test concepts of the samples."""
        return data.test[:: max(1, len(data.test) // self.concepts)][: self.concepts]

    def path(self, method: str, suffix: str) -> Path:
        """Return the path of a row or of its samples."""
        return self.folder / f"{method.replace(', ', '-').replace(' ', '-')}.{suffix}"

    def row(self, method: str, data: IconData, judges: Judges, lpips: Lpips) -> Row | None:
        """Return a finished row with the scores of its samples, or None if it is not finished."""
        path, strip = self.path(method, "json"), self.path(method, "png")
        if not (path.exists() and strip.exists()):
            return None
        row: Row = json.loads(path.read_text())
        concepts, found = self.tested(data), read_strip(strip)
        ranks = judges.concept_ranks(found, concepts)
        return row | {
            "style_vote": mean(float(style == self.style) for style in judges.style_of(found)),
            "top1": float((ranks < 1).float().mean()),
            "top5": float((ranks < 5).float().mean()),
            "lpips": float(torch.as_tensor(lpips(found, data.styles[self.style].pixels(concepts))).mean()),
        }

    def _teacher(self, images: Path) -> Path:
        path = self._trained("lora", data=images, **LORA)
        kohya = path.with_name("kohya.safetensors")
        convert(path, kohya, "kohya")
        return kohya

    def _student(self, name: str, images: Path, concepts: Sequence[str] = ()) -> Callable[[], Path]:
        """Return a function that trains a student, on the images if there are no concepts to prompt for."""
        own = IconData(self.icons).styles[self.style]
        taught = {
            "teacher": str(self.folder / "lora" / "kohya.safetensors"),
            "teacher_prompts": tuple(own.prompt(concept) for concept in concepts[: self.latents]),
            "teacher_latents": self.latents,
            "teacher_steps": 12,
            "teacher_batch_size": 16,
            "teacher_latents_dir": self.folder / "latents",
        }
        source: dict[str, Any] = taught if concepts else {"data": images}
        folder = f"{name}-{'distilled' if concepts else 'images'}"
        return lambda: self._trained(folder, **source, **STUDENTS[name])

    def _trained(self, name: str, **settings: Any) -> Path:
        started = time.process_time()
        config = TrainConfig(
            base=str(BASE),
            output=self.folder / name,
            steps=self.steps,
            batch_size=4,
            lr_scheduler="cosine",
            lr_warmup_steps=12,
            seed=self.seed,
            cpu=True,
            log_with="none",
            checkpoint_every=50,
            resume=True,
            **settings,
        )
        if not config.file.exists():
            result = train(config, verbose=False)
            seconds = {"seconds": time.process_time() - started, "steps": result.steps}
            result.path.with_name("seconds.json").write_text(json.dumps(seconds))
        return config.file


def table_of(rows: Sequence[Row]) -> list[str]:
    """Return the Markdown table: means over the seeds of each style, with the share of the teacher's gain."""
    lines = [
        "| style | tuner | held-out loss ↓ | share of the LoRA's gain | style vote ↑ | top-1 ↑ | top-5 ↑ | LPIPS ↓ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for style in dict.fromkeys(row["style"] for row in rows):
        losses = {}
        for method in ROWS:
            found = [row for row in rows if (row["style"], row["method"]) == (style, method)]
            if not found:
                continue
            means = {key: mean(row[key] for row in found) for key in ("held_out_loss", "style_vote", "top1", "top5",
                                                                       "lpips")}  # fmt: skip
            losses[method] = means["held_out_loss"]
            share = gain_share(losses, method)
            lines.append(
                f"| `{style}` | {method} | {means['held_out_loss']:.4f} | {share} | {means['style_vote']:.2f} | "
                f"{means['top1']:.2f} | {means['top5']:.2f} | {means['lpips']:.3f} |"
            )
    return lines


def gain_share(losses: dict[str, float], method: str) -> str:
    """Return the decrease of a method's loss from the base's, as a share of that of the teacher."""
    if method == "base" or "LoRA, the teacher" not in losses:
        return ""
    return f"{(losses['base'] - losses[method]) / (losses['base'] - losses['LoRA, the teacher']):.0%}"


def main() -> None:
    """Compute the stages of a style, or print the table of the finished rows and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--icons", type=Path, required=True, help="folder of prepare_icons.py --benchmark")
    parser.add_argument("--work", type=Path, required=True, help="folder of the stages")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train and sample")
    one.add_argument("style", choices=("openmoji", "fluent-emoji"))
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--only", default="*", help="pattern of the rows to compute, such as '*distilled'")
    shown = commands.add_parser("table", help="score the samples and print the table")
    shown.add_argument("--judges", type=Path, required=True, help="folder of the judges of benchmarks.icon_style")
    shown.add_argument("--judge-epochs", type=int, default=30)
    shown.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "run":
        Run(arguments.icons, arguments.work, arguments.style, arguments.seed).compute(arguments.only)
        return
    data, lpips = IconData(arguments.icons), Lpips()
    judges = load_judges(
        data, load_base(str(BASE), torch.float32).vae, arguments.judges, epochs=arguments.judge_epochs
    )
    rows = [
        row
        for style in ("openmoji", "fluent-emoji")
        for seed in range(3)
        for method in ROWS
        if (row := Run(arguments.icons, arguments.work, style, seed).row(method, data, judges, lpips)) is not None
    ]
    publish("benchmarks.distillation", rows, table_of(rows), "trained and sampled on the CPU", arguments.output)


if __name__ == "__main__":
    main()
