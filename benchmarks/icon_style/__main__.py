"""The icon-style benchmark: train tuners on a style unknown to the base, and test them on concepts known to it.

    python research/restune_tiny/prepare_icons.py data/icons --download --benchmark
    python -m benchmarks.icon_style all openmoji --icons data/icons --work work --out work/report

Separate parts and further commands:

    python -m benchmarks.icon_style base --icons data/icons --work work
    python -m benchmarks.icon_style style openmoji --icons data/icons --work work
    python -m benchmarks.icon_style style openmoji --icons data/icons --work work --study
    python -m benchmarks.icon_style subject --icons data/icons --work work
    python -m benchmarks.icon_style report --icons data/icons --work work

Finished results stay in the work folder and are not computed again.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from PIL import Image

from research.restune_tiny.icon_sources import DEVELOPMENT_SETS
from restune_diffusion.cli.quiet import quiet_libraries
from restune_diffusion.cli.run_demo import BASE
from restune_diffusion.evaluation import InceptionFeatures, Lpips
from restune_diffusion.imaging.contact_sheet import labelled_grid
from restune_diffusion.pipelines.load_base import load_base
from restune_diffusion.utils.atomic_write import atomic_write

from .base import judge_base
from .character import held_out, render
from .data import IconData, to_images
from .judges import Judges, load_judges
from .parallel import run_parallel
from .report import environment, style_grid, write_report
from .runner import CLOCK, Settings, StyleRun, read_strip, slug
from .sampling import ImageSampler
from .scores import Yardsticks
from .subject import ABOUT, SubjectRun


@dataclass(frozen=True)
class Common:
    """Options of every command."""

    icons: Path
    """Folder written by `research/restune_tiny/prepare_icons.py --benchmark`."""
    work: Path
    """Folder for intermediate results."""
    base: Path = BASE
    """Directory of a Stable Diffusion base pretrained on the icons."""
    quick: bool = False
    """Run a short version for trial runs; use a separate work folder for it."""

    @property
    def settings(self) -> Settings:
        """Settings of the run: full or quick."""
        return Settings.quick() if self.quick else Settings()

    def data(self) -> IconData:
        """Return the icon sets."""
        return IconData(self.icons)

    def pipeline(self) -> Any:
        """Return the frozen base."""
        pipeline = load_base(str(self.base), torch.float32)
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            module.requires_grad_(False)
        return pipeline

    def judges(self, pipeline: Any) -> Judges:
        """Return the classifiers; train them if the work folder has none."""
        settings = self.settings
        epochs, decoded = settings.judge_epochs, settings.judge_decoded
        return load_judges(self.data(), pipeline.vae, self.work, epochs=epochs, decoded=decoded)


@dataclass(frozen=True)
class BaseCommand(Common):
    """Classify samples of the base: one image of every pretraining concept, each in one of the base's styles."""

    distance: bool = False
    """Also measure the KID in each of the base's own styles, the error of the base before any tuning."""
    guidance: float | None = None
    """Guidance scale; the benchmark's default if not given."""
    away: float = 0.0
    """Scale of guidance away from the prompt without its style; costs one more forward pass per step."""
    rescale: float = 0.0
    """Guidance rescale, from 0 to 1: share of the contrast gain of guidance to remove."""

    def run(self) -> None:
        """Evaluate the base, print the result and write it to the work folder."""
        pipeline, settings = self.pipeline(), self.settings
        scale = settings.guidance if self.guidance is None else self.guidance
        try:
            sampler = ImageSampler(pipeline, settings.inference_steps, scale, away=self.away, rescale=self.rescale)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        judge_base(
            sampler,
            self.data(),
            self.judges(pipeline),
            settings,
            self.work,
            every=8 if self.quick else 1,
            inception=InceptionFeatures() if self.distance else None,
        )


@dataclass(frozen=True)
class StyleCommand(Common):
    """Train every method on a style and score its samples."""

    style: Annotated[str, tyro.conf.Positional] = DEVELOPMENT_SETS[0]
    """One of the development styles."""
    seed: int = 0
    """Seed of tuning images, tuners, batches and samples; learning rates are chosen with seed 0."""
    shard: int = 0
    """Run only the methods of this shard. Run all shards again when they are done, for the rows at equal time."""
    shards: int = 1
    """Number of processes that share the methods."""
    only: tuple[str, ...] = ("*",)
    """Patterns of the names of the methods to run."""
    study: bool = False
    """Compare variants of the bypass and gradient depths instead of the methods."""

    def run(self) -> None:
        """Compute the missing rows."""
        started, pipeline = time.time(), self.pipeline()
        yardsticks = Yardsticks(InceptionFeatures(), Lpips(), self.judges(pipeline))
        run = StyleRun(pipeline, self.data(), yardsticks, self.style, self.seed, self.settings, self.work)
        compute = run.study if self.study else run.run
        compute(
            lambda text: print(f"{time.strftime('%H:%M:%S')} {text}", flush=True),
            only=self.only,
            shard=self.shard,
            shards=self.shards,
        )
        print(f"{(time.time() - started) / 60:.1f} min")


@dataclass(frozen=True)
class SubjectCommand(Common):
    """Train every method on five images of a new character."""

    seed: int = 0
    """Seed of tuners, batches and samples."""
    rates_from: str = DEVELOPMENT_SETS[0]
    """Style whose learning rate sweep is used, if it was run."""

    def run(self) -> None:
        """Compute the missing rows and write all rows to one file."""
        rates = {}
        for path in sorted((self.work / f"{self.rates_from}-seed0" / "rows").glob("*-steps.json")):
            row = json.loads(path.read_text())
            rates[row["method"]] = row["learning_rate"]
        task = SubjectRun(self.pipeline(), InceptionFeatures(), Lpips(), self.settings, self.seed, rates, self.work)
        rows = task.run()
        with atomic_write(task.folder / "rows.json") as file:
            file.write(json.dumps(rows, indent=1).encode())
        for row in rows:
            print(row)


@dataclass(frozen=True)
class AllCommand(Common):
    """Run the whole benchmark for one style and seed: judges, every method twice, subject task and report."""

    style: Annotated[str, tyro.conf.Positional] = DEVELOPMENT_SETS[0]
    """One of the development styles."""
    seed: int = 0
    """Seed of tuning images, tuners, batches and samples."""
    processes: int = 2
    """Number of processes that share the methods; one per core is best."""
    out: Path = Path("benchmarks/results/icon_style")
    """Folder of the report."""
    remark: str = ""
    """Remark about this run for the report."""

    def run(self) -> None:
        """Compute the missing results, and write the report with the total time in minutes."""
        # The total time is reported only for an empty work folder: existing results took no time.
        started, fresh = time.time(), not (self.work.exists() and any(self.work.iterdir()))
        seed = ("--seed", str(self.seed))
        style = self._command("style", self.style, *seed)
        shards = [[*style, "--shard", str(part), "--shards", str(self.processes)] for part in range(self.processes)]
        subject = self._command("subject", *seed, "--rates-from", self.style)
        # Only base and true images: the judges are trained once, before several processes use them.
        judges = [*style, "--only", "no method"]
        # With a sweep, the subject task runs after the learning rates are chosen.
        passes = [[judges], shards, [*shards, subject]] if self.settings.sweep else [[judges, subject], shards]
        for commands in passes:
            run_parallel(commands)
        remark = self.remark
        if fresh:
            minutes = (time.time() - started) / 60
            took = f"The whole run took {minutes:.0f} minutes with {self.processes} parallel processes."
            remark = f"{remark} {took}".strip()
        run_parallel([self._command("report", "--out", str(self.out), "--remark", remark)])

    def _command(self, *words: str) -> list[str]:
        common = ["--icons", str(self.icons), "--work", str(self.work), "--base", str(self.base)]
        return [*words, *common, *(["--quick"] if self.quick else [])]


@dataclass(frozen=True)
class ReportCommand(Common):
    """Write the Markdown report, the JSON file and the grids from all rows in the work folder."""

    out: Path = Path("benchmarks/results/icon_style")
    """Folder of the report."""
    remark: str = ""
    """Remark about this run for the report."""

    def run(self) -> None:
        """Write the report."""
        data = self.data()
        rows = [json.loads(path.read_text()) for path in sorted(self.work.glob("*-seed*/rows/*.json"))]
        rows = [row for row in rows if "table" in row]
        rows.sort(key=lambda row: (DEVELOPMENT_SETS.index(row["style"]), row["seed"], _order(row)))
        settings = self.settings
        stride = max(1, len(data.test) // settings.concepts)
        concepts = data.test[::stride][: settings.concepts]
        for style in dict.fromkeys(row["style"] for row in rows):
            folder = self.work / f"{style}-seed0"
            methods = [r["method"] for r in rows if (r["style"], r["seed"], r["table"]) == (style, 0, "steps")]
            if not methods:
                continue
            _save(style_grid(data, folder, style, concepts, methods), self.out / f"grid-{style}.png")
        subject: list[dict[str, Any]] = []
        for path in sorted(self.work.glob("subject-seed*/rows.json")):
            subject += json.loads(path.read_text())
        if subject:
            _save(self._subject_grid(subject), self.out / "grid-subject.png")
        about = f"{self.remark}\n\n" if self.remark else ""
        about += (
            f"Training: 24 images of a style unknown to the base, {settings.steps} steps at batch size "
            f"{settings.batch}. Test: {len(concepts)} other concepts, {settings.inference_steps} DDIM steps, guidance "
            f"{settings.guidance:g}. The learning rate of each method was chosen by its denoising loss on 48 held-out "
            f"images of the style."
        )
        if any(row["table"] == "time" for row in rows):
            about += f" Equal time: every method trains for the time that {CLOCK} took."
        command = f"python -m benchmarks.icon_style report{' --quick' if self.quick else ''} --icons ... --work ..."
        facts = {"about": about, "subject": ABOUT, **environment(command)}
        write_report(self.out, rows, subject, facts)
        print(self.out / "report.md")

    def _subject_grid(self, rows: list[dict[str, Any]]) -> Image.Image:
        methods = [row["method"] for row in rows if "learning_rate" in row]
        folder = self.work / "subject-seed0" / "drawings"
        columns = {"true image": [render(scene.svg) for scene in held_out()]}
        columns["base"] = to_images(read_strip(folder / "base.png"))
        for method in dict.fromkeys(methods):
            title = method.replace("attention", "attn").replace("feed-forward", "ff")
            columns[title] = to_images(read_strip(folder / f"{slug(method)}.png"))
        grid = [list(row) for row in zip(*columns.values(), strict=True)]
        return labelled_grid(grid, [scene.prompt for scene in held_out()], list(columns), cell=160)


def _order(row: dict[str, Any]) -> tuple[int, float]:
    """Return the sort key of a row: true images, base, then the methods in running order."""
    first = ("true pictures", "base, not tuned", "skip", "res", "bypass", "LoRA", "full", "biases")
    place = next(number for number, name in enumerate(first) if row["method"].startswith(name))
    wide = 0.5 if "feed-forward" in row["method"] else 0.0
    return place, wide + row.get("parameters", 0) / 1e9


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        image.save(file, format="PNG", optimize=True)


Command = (
    Annotated[AllCommand, tyro.conf.subcommand("all")]
    | Annotated[BaseCommand, tyro.conf.subcommand("base")]
    | Annotated[StyleCommand, tyro.conf.subcommand("style")]
    | Annotated[SubjectCommand, tyro.conf.subcommand("subject")]
    | Annotated[ReportCommand, tyro.conf.subcommand("report")]
)


def main() -> None:
    """Run the command line."""
    quiet_libraries()
    # One thread: two parallel runs then use two cores, and tiny models gain nothing from more.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    command: Any = tyro.cli(Command, prog="python -m benchmarks.icon_style", description=__doc__)
    command.run()


if __name__ == "__main__":
    main()
