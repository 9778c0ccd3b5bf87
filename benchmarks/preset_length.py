"""Train the `style` preset for several lengths on several numbers of images, and test on other concepts.

    python research/restune_tiny/prepare_icons.py data/icons --download --benchmark
    python -m benchmarks.preset_length --icons data/icons --work work/length --output benchmarks/results/preset_length

Every run is a run of its own with the preset's schedule to its end; a checkpoint of a longer run would have a higher
learning rate. The image sets are nested: the 8 images are among the 24, and the 24 among the 100. Finished runs stay
in the work folder and are not computed again, and `--shard I --shards N` divides them among N processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.icon_style.data import IconData, write_tuning_images
from benchmarks.icon_style.methods import held_out_loss
from benchmarks.icon_style.sampling import ImageSampler
from benchmarks.results_file import publish
from research.restune_tiny.icon_sources import DEVELOPMENT_SETS
from restune_diffusion import Tuner, attach, load_tuner
from restune_diffusion.cli.run_demo import BASE
from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.evaluation import InceptionFeatures, Lpips
from restune_diffusion.evaluation.metrics import nearest_distance
from restune_diffusion.pipelines.load_base import load_base
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.config.presets import PRESETS
from restune_diffusion.training.latents.cache import build_cache
from restune_diffusion.training.losses.objective import Objective
from restune_diffusion.utils.atomic_write import atomic_write

LENGTHS = {8: (60, 125, 250, 500, 1000), 24: (125, 250, 500, 1000, 2000), 100: (250, 500, 1000, 2000)}
"""Steps to try for each number of images; the batch size is the preset's."""
MOST_IMAGES = max(LENGTHS)
Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """Study of one style: the base, its data, and the networks of the metrics.

    Args:
        icons: folder written by `research/restune_tiny/prepare_icons.py --benchmark`.
        work: folder of intermediate results.
        style: name of a development style.
        concepts: number of test concepts.
    """

    icons: Path
    work: Path
    style: str
    concepts: int = 50

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield number of images and steps of every run; (0, 0) is the base."""
        yield 0, 0
        for images, lengths in LENGTHS.items():
            for steps in lengths:
                yield images, steps

    def compute(self, *, shard: int, shards: int) -> None:
        """Compute the missing rows of a shard."""
        pipeline = load_base(str(BASE), torch.float32)
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            module.requires_grad_(False)
        data = IconData(self.icons)
        own = data.styles[self.style]
        split = data.split(self.style, 0, tuning=MOST_IMAGES)
        stride = max(1, len(data.test) // self.concepts)
        test = data.test[::stride][: self.concepts]
        held_out = write_tuning_images(own, split.selection, self.work / f"{self.style}-held-out-{shard}")
        cache = build_cache(pipeline, load_samples(find_examples(held_out), 64))
        sampler, objective = ImageSampler(pipeline, 20, 4.0), Objective(pipeline.scheduler)
        inception, lpips = InceptionFeatures(), Lpips()
        true = own.pixels(test)
        for images, steps in list(self.runs())[shard::shards]:
            path = self.row_path(images, steps)
            if path.exists():
                continue
            chosen = split.tuning[:images]
            tuner = self._tuner(pipeline, chosen, steps) if images else None
            with attach(pipeline.unet, tuner) if tuner else nullcontext():
                loss = held_out_loss(pipeline.unet, cache, objective)
                found = sampler.generate([own.prompt(concept) for concept in test], seed=0)
            row: Row = {"style": self.style, "images": images, "steps": steps, "held_out_loss": loss}
            row["lpips"] = float(torch.as_tensor(lpips(found, true)).mean())
            if images:
                features = inception(own.pixels(chosen))
                row["nearest"] = float(nearest_distance(inception(found), features).mean())
            with atomic_write(path) as file:
                file.write(json.dumps(row).encode())
            print(row, flush=True)

    def _tuner(self, pipeline: Any, chosen: list[str], steps: int) -> Tuner:
        own = IconData(self.icons).styles[self.style]
        folder = write_tuning_images(own, chosen, self.work / f"{self.style}-{len(chosen)}-{steps}-data")
        output = self.work / f"{self.style}-{len(chosen)}-{steps}"
        shutil.rmtree(output, ignore_errors=True)
        config = TrainConfig(
            base=str(BASE), data=folder, output=output, name="style", preset="style", steps=steps, log_with="none"
        )
        train(config, pipeline=pipeline, verbose=False)
        return load_tuner(output / "style.safetensors")

    def row_path(self, images: int, steps: int) -> Path:
        """Return the path of a finished row."""
        return self.work / "rows" / f"{self.style}-{images}-{steps}.json"


def table(rows: list[Row], batch: int) -> list[str]:
    """Return the Markdown table of all finished rows."""
    lines = [
        "| style | images | steps | epochs | held-out loss | LPIPS | distance to nearest training image |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        tuned = row["images"] > 0
        epochs = row["steps"] * batch / row["images"] if tuned else 0
        what = f"{row['images']} | {row['steps']} | {epochs:.0f}" if tuned else "base |  | "
        nearest = f"{row['nearest']:.3f}" if tuned else ""
        lines.append(f"| {row['style']} | {what} | {row['held_out_loss']:.4f} | {row['lpips']:.3f} | {nearest} |")
    return lines


def main() -> None:
    """Compute the missing rows and write the table of all finished rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--icons", type=Path, required=True, help="folder written by prepare_icons.py --benchmark")
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate results")
    parser.add_argument("--style", choices=DEVELOPMENT_SETS, action="append", help="style; all if not given")
    parser.add_argument("--shard", type=int, default=0, help="number of this process")
    parser.add_argument("--shards", type=int, default=1, help="number of processes that share the runs")
    parser.add_argument("--table-only", action="store_true", help="write the finished rows without computing others")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    (arguments.work / "rows").mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for style in arguments.style or DEVELOPMENT_SETS:
        study = Study(arguments.icons, arguments.work, style)
        if not arguments.table_only:
            study.compute(shard=arguments.shard, shards=arguments.shards)
        paths = [study.row_path(images, steps) for images, steps in study.runs()]
        rows += [json.loads(path.read_text()) for path in paths if path.exists()]
    batch = PRESETS["style"].settings["batch_size"]
    how = f"`style` preset, batch size {batch}, one seed, 48 held-out images, 50 test concepts, 20 steps, guidance 4"
    publish("benchmarks.preset_length", rows, table(rows, batch), how, arguments.output)


if __name__ == "__main__":
    main()
