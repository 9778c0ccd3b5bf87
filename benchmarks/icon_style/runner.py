"""Train every method on one style and score its samples; finished rows are saved, so a run can be resumed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from research.restune_tiny.icon_sources import PRETRAINING_SETS
from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.training.latents.batches import Batches
from restune_diffusion.training.latents.cache import Cache, build_cache
from restune_diffusion.training.losses.objective import Objective
from restune_diffusion.utils.atomic_write import atomic_write

from .data import IconData, Split, to_images, to_pixels, write_tuning_images
from .methods import CUSTOMARY_RANK, Course, Method, Trainable, bypass_variants, contestants, held_out_loss, tune
from .sampling import ImageSampler
from .scores import Scorer, Yardsticks, mean

Row = dict[str, Any]
CLOCK = f"LoRA r={CUSTOMARY_RANK}, attention"
"""Method whose training time is the budget of all methods in the second table."""


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark run; the defaults are those of the full run."""

    steps: int = 200
    batch: int = 8
    warmup: float = 0.05
    inference_steps: int = 20
    guidance: float = 4.0
    concepts: int = 100
    drift_concepts: int = 5
    reference: int = 300
    sweep: bool = True
    equal_time: bool = True
    judge_epochs: int = 30
    judge_decoded: bool = True

    @classmethod
    def quick(cls) -> Settings:
        """Return settings for a trial run: short training, few samples, one learning rate per method, one table."""
        return cls(
            steps=40,
            inference_steps=10,
            concepts=25,
            drift_concepts=1,
            reference=100,
            sweep=False,
            equal_time=False,
            judge_epochs=12,
            judge_decoded=False,
        )


class StyleRun:
    """Benchmark run of one style and one seed.

    Args:
        pipeline: the base.
        data: the icon sets.
        yardsticks: networks of the metrics.
        style: name of a development style.
        seed: seed of the tuning images, the tuners, the batches and the samples.
        settings: settings of the run.
        work: folder for intermediate results; rows found there are not computed again.
    """

    def __init__(
        self,
        pipeline: Any,
        data: IconData,
        yardsticks: Yardsticks,
        style: str,
        seed: int,
        settings: Settings,
        work: Path,
    ) -> None:
        self.pipeline, self.data, self.yardsticks = pipeline, data, yardsticks
        self.style, self.seed, self.settings = style, seed, settings
        self.folder = work / f"{style}-seed{seed}"
        self.split: Split = data.split(style, seed)
        stride = max(1, len(data.test) // settings.concepts)
        self.concepts = data.test[::stride][: settings.concepts]
        self.sampler = ImageSampler(pipeline, settings.inference_steps, settings.guidance)
        self.objective = Objective(pipeline.scheduler)

    @cached_property
    def scorer(self) -> Scorer:
        """Reference images and features for scoring."""
        chosen = self.split.reference[:: max(1, len(self.split.reference) // self.settings.reference)]
        return Scorer.of(self.data, self.style, self.concepts, self.split.tuning, chosen, self.yardsticks)

    @cached_property
    def batches(self) -> Batches:
        """Training batches, the same for every method."""
        return Batches(
            self._cache("tuning", self.split.tuning),
            seed=self.seed,
            size=self.settings.batch,
            timesteps=self.objective.timesteps,
            caption_dropout=0.0,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )

    @cached_property
    def selection(self) -> Cache:
        """Cache of the held-out images for choosing learning rates."""
        return self._cache("selection", self.split.selection)

    def _cache(self, name: str, concepts: list[str]) -> Cache:
        folder = write_tuning_images(self.data.styles[self.style], concepts, self.folder / name)
        return build_cache(self.pipeline, load_samples(find_examples(folder), 64))

    # --- samples

    @property
    def prompts(self) -> list[str]:
        """Prompts of the test concepts in the trained style."""
        return [self.data.styles[self.style].prompt(concept) for concept in self.concepts]

    @property
    def old_prompts(self) -> list[str]:
        """Prompts of test concepts in the base's own styles, for measuring drift."""
        chosen = self.concepts[:: max(1, len(self.concepts) // self.settings.drift_concepts)]
        chosen = chosen[: self.settings.drift_concepts]
        return [self.data.styles[name].prompt(concept) for name in PRETRAINING_SETS for concept in chosen]

    @cached_property
    def base_old_samples(self) -> Tensor:
        """Samples of the base for `old_prompts`."""
        return self._saved_samples("base-old", self.old_prompts, None)

    def _saved_samples(self, name: str, prompts: Sequence[str], unet: Any) -> Tensor:
        """Return samples, generated or read from an earlier run; they are saved as one PNG strip."""
        path = self.folder / "drawings" / f"{name}.png"
        if not path.exists():
            images = self.sampler.generate(prompts, seed=self.seed, unet=unet)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                to_images(torch.cat(list(images), dim=1)[None])[0].save(file, format="PNG")
        return read_strip(path)

    # --- rows

    def run(
        self,
        log: Callable[[str], None] = print,
        *,
        only: Sequence[str] = ("*",),
        shard: int = 0,
        shards: int = 1,
    ) -> list[Row]:
        """Compute the rows: true images, base, and every method at equal steps and at equal time.

        Args:
            log: function called with a description of every row.
            only: `fnmatch` patterns of the names of the methods.
            shard, shards: compute only every `shards`-th method, so that several processes share the work. The rows at
                equal time require the finished row of `CLOCK` and are skipped without it.
        """
        rows = [self._row("true pictures", "both", self._score_true), self._row("base, not tuned", "both", self._base)]
        for row in rows:
            log(describe(row))
        methods = self._chosen(contestants(self.pipeline.unet), only)[shard::shards]
        for method in methods:
            rows.append(self._row(method.name, "steps", partial(self._tuned, method, "steps")))
            log(describe(rows[-1]))
        clock = self._row_path(CLOCK, "steps")
        if self.settings.equal_time and clock.exists():
            budget: float = json.loads(clock.read_text())["seconds"]
            for method, row in zip(methods, rows[2:], strict=True):
                rows.append(self._row(method.name, "time", partial(self._in_time, method, row, budget)))
                log(describe(rows[-1]))
        return rows

    def study(
        self,
        log: Callable[[str], None] = print,
        *,
        only: Sequence[str] = ("*",),
        shard: int = 0,
        shards: int = 1,
    ) -> list[Row]:
        """Compute the rows of the bypass variants at equal steps; the arguments are those of `run`."""
        rows = []
        for method in self._chosen(bypass_variants(self.pipeline.unet), only)[shard::shards]:
            rows.append(self._row(method.name, "study", partial(self._tuned, method, "study")))
            log(describe(rows[-1]))
        return rows

    @staticmethod
    def _chosen(methods: Sequence[Method], only: Sequence[str]) -> list[Method]:
        return [method for method in methods if any(fnmatch(method.name, pattern) for pattern in only)]

    def _row_path(self, method: str, table: str) -> Path:
        return self.folder / "rows" / f"{slug(method)}-{table}.json"

    def _row(self, method: str, table: str, compute: Callable[[], Row]) -> Row:
        path = self._row_path(method, table)
        if path.exists():
            kept: Row = json.loads(path.read_text())
            return kept
        row = {"style": self.style, "seed": self.seed, "method": method, "table": table, **compute()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(row, indent=1).encode())
        return row

    def _score_true(self) -> Row:
        return self.scorer.score(self.scorer.true_images)

    def _base(self) -> Row:
        return self.scorer.score(self._saved_samples("base", self.prompts, None)) | {"drift": 0.0}

    def _tuned(self, method: Method, table: str) -> Row:
        """Choose the learning rate and score the tuned model."""
        chosen = self._known_rate(method, table)
        rates = (chosen,) if chosen else method.learning_rates if self.settings.sweep else method.learning_rates[1:2]
        best: tuple[float, float, Trainable, Course] | None = None
        losses = {}
        for rate in rates:
            trainable = method.start(self.pipeline.unet, self.seed)
            course = self._tune(trainable, self.settings.steps, rate)
            losses[f"{rate:g}"] = loss = held_out_loss(trainable.unet, self.selection, self.objective)
            if best is None or loss < best[0]:
                best = loss, rate, trainable, course
        assert best is not None
        _, rate, trainable, course = best
        return (
            self._scored(method, table, trainable) | {"learning_rate": rate, "selection_loss": losses} | asdict(course)
        )

    def _known_rate(self, method: Method, table: str) -> float | None:
        """Return the learning rate chosen by the sweep of seed 0."""
        path = self._row_path(method.name, table)
        first = self.folder.with_name(f"{self.style}-seed0") / "rows" / path.name
        return json.loads(first.read_text())["learning_rate"] if self.seed and first.exists() else None

    def _in_time(self, method: Method, row: Row, budget: float) -> Row:
        """Train for the time budget and score the tuned model."""
        steps = max(1, round(budget / row["seconds_per_step"]))
        if steps == row["steps"]:
            return {key: value for key, value in row.items() if key not in ("style", "seed", "method", "table")}
        trainable = method.start(self.pipeline.unet, self.seed)
        course = self._tune(trainable, steps, row["learning_rate"])
        return self._scored(method, "time", trainable) | {"learning_rate": row["learning_rate"]} | asdict(course)

    def _tune(self, trainable: Trainable, steps: int, rate: float) -> Course:
        return tune(
            trainable, self.batches, self.objective, steps=steps, learning_rate=rate, warmup=self.settings.warmup
        )

    def _scored(self, method: Method, table: str, trainable: Trainable) -> Row:
        name = f"{slug(method.name)}-{table}"
        drawn = self._saved_samples(name, self.prompts, trainable.unet)
        old = self._saved_samples(f"{name}-old", self.old_prompts, trainable.unet)
        drift = mean(self.yardsticks.lpips(old, self.base_old_samples))
        return self.scorer.score(drawn) | {"drift": drift, "parameters": trainable.count}


def read_strip(path: Path) -> Tensor:
    """Read the images of a PNG strip: N x 3 x side x side in [0, 1]."""
    from PIL import Image

    with Image.open(path) as strip:
        pixels = to_pixels([strip])[0]
    side = min(pixels.shape[1:])
    return torch.stack(pixels.split(side, dim=1 if pixels.shape[1] > side else 2))


def slug(name: str) -> str:
    """Return a file name for a method's name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def describe(row: Row) -> str:
    """Return a one-line description of a row."""
    numbers = ("kid", "style_accuracy", "top1", "top5", "lpips", "similarity", "nearest_tuning", "drift")
    text = ", ".join(f"{key} {row[key]:.3f}" for key in numbers if key in row)
    return f"{row['style']} seed {row['seed']} {row['method']} ({row['table']}): {text}"
