"""Time savings of the feature cache and of a sweep for a bypass tuner, and the quality cost of the cache.

    python research/restune_tiny/prepare_icons.py data/icons --download --benchmark
    python -m benchmarks.feature_cache quality --icons data/icons --output benchmarks/results/feature_cache
    python -m benchmarks.feature_cache time --output benchmarks/results/feature_cache
    python -m benchmarks.feature_cache size --output benchmarks/results/feature_cache
    python -m benchmarks.feature_cache sweep --output benchmarks/results/feature_cache

Each part adds its rows to the same files. Quality is the denoising loss on held-out images of the style, the loss that
the icon-style benchmark uses to choose learning rates. One feature cache of the largest size is computed; the smaller
ones are its first samples. Times are processor times, which depend less on other programs than wall-clock times.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from benchmarks.backward_memory import SD15
from benchmarks.icon_style.data import IconData, write_tuning_images
from benchmarks.icon_style.methods import held_out_loss
from benchmarks.results_file import publish
from restune_diffusion import BypassConfig, Tuner, attach
from restune_diffusion.backbones import describe_base
from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.training import TrainConfig
from restune_diffusion.training.build import build_accelerator, build_training_state
from restune_diffusion.training.feature_cache.batches import CachedFeatureBatches, CachedFeatureSampler
from restune_diffusion.training.feature_cache.layout import FeatureCacheLayout
from restune_diffusion.training.feature_cache.shared_pass import share_passes
from restune_diffusion.training.feature_cache.tap_features import TapFeatures, predict_from_features, record_features
from restune_diffusion.training.feature_cache.use import use_feature_cache
from restune_diffusion.training.inputs import TrainingInputs, prepared
from restune_diffusion.training.latents.batches import BatchSource
from restune_diffusion.training.latents.cache import Cache, build_cache
from restune_diffusion.training.loop import steps_of
from restune_diffusion.training.state import TrainState
from restune_diffusion.training.sweeps.grid import parse_sweep
from restune_diffusion.training.trainer import acting

TINY = Path(__file__).parents[1] / "restune_diffusion" / "assets" / "restune-tiny"
STYLE = "openmoji"
SIZES = (1, 4, 16, 64)
LEARNING_RATE = 5e-3
Row = dict[str, Any]


class FirstSamples(CachedFeatureSampler):
    """Sampler over the first noise and timestep samples of a larger feature cache."""

    def __init__(self, length: int, seed: int, count: int, used: int) -> None:
        super().__init__(length, seed, count)
        self._used = used

    def entry(self, position: int) -> tuple[int, int]:
        """Return the image index at a position and the index of its cached sample."""
        return self._image_at(position), position // self._length % self._used


def settings(data: Path, output: Path, **changes: Any) -> TrainConfig:
    """Return the config of a bypass training run on the bundled base on the CPU."""
    common = {"base": str(TINY), "data": data, "output": output, "tuner": "bypass", "cpu": True, "batch_size": 8}
    return TrainConfig(**{**common, "learning_rate": LEARNING_RATE, "checkpoint_every": 0, **changes})


@contextmanager
def inputs_of(config: TrainConfig) -> Iterator[tuple[Any, TrainingInputs]]:
    """Context manager with the base loaded and the images encoded; yields the accelerator and the training inputs."""
    accelerator = build_accelerator(config)
    with prepared(config, accelerator) as inputs:
        yield accelerator, inputs


def train_on(run: TrainState, batches: BatchSource | None = None) -> float:
    """Train to the last step and return the median processor time of a step in seconds."""
    if batches is not None:
        run.batches = batches
    seconds: list[float] = []
    steps = steps_of(run, [])
    while True:
        started = time.process_time()
        if next(steps, None) is None:
            return median(seconds[1:])
        seconds.append(time.process_time() - started)


def held_out(run: TrainState, selection: Cache) -> float:
    """Return the denoising loss of a run's tuner on held-out images."""
    with attach(run.pipeline.unet, run.tuner):
        return held_out_loss(run.pipeline.unet, selection, run.objective)


def quality_of_seed(icons: Path, seed: int, steps: int, work: Path) -> list[Row]:
    """Train one tuner without a feature cache and one with each cache size; return a row for each."""
    data = IconData(icons)
    split, style = data.split(STYLE, seed), data.styles[STYLE]
    images = write_tuning_images(style, split.tuning, work / "tuning")
    others = write_tuning_images(style, split.selection, work / "selection")
    rows = []
    config = settings(images, work / "out", steps=steps, seed=seed, feature_cache=max(SIZES))
    with inputs_of(config) as (accelerator, inputs):
        selection = build_cache(inputs.pipeline, load_samples(find_examples(others), inputs.resolution))
        start = build_training_state(config, accelerator, inputs)
        rows.append({"bank": "before training", "loss": held_out(start, selection)})
        plain = config.model_copy(update={"feature_cache": None})
        fresh = build_training_state(plain, accelerator, inputs)
        with acting(fresh):
            seconds = train_on(fresh)
        rows.append({"bank": "none", "loss": held_out(fresh, selection), "seconds": seconds})
        began = time.process_time()
        feature_cache = use_feature_cache([start], inputs.models, verbose=False)
        made = time.process_time() - began
        for used in SIZES:
            run = build_training_state(config, accelerator, inputs)
            sampler = FirstSamples(len(inputs.cache), seed, max(SIZES), used)
            run.batches._sampler = sampler  # type: ignore[attr-defined]
            batches = CachedFeatureBatches(
                run.batches, sampler, feature_cache, size=8, device=accelerator.device, dtype=torch.float32
            )
            seconds = train_on(run, batches)
            rows.append({"bank": used, "loss": held_out(run, selection), "seconds": seconds})
        rows[-1]["making"] = made
    return [{"part": "quality", "seed": seed, "steps": steps, **row} for row in rows]


def timed(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Run the functions in turn, `rounds` times each, and return their median processor times in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = time.process_time()
            way()
            if number:  # warmed up
                seconds[name].append(time.process_time() - started)
    return {name: median(times) for name, times in seconds.items()}


def time_of_steps(unet: Any, what: str, batch: int, size: int, rounds: int) -> list[Row]:
    """Compare a training step on cached features with a step that runs the base's forward pass."""
    unet.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    tuner = Tuner.for_base(unet, BypassConfig(), generator=generator)
    noisy = torch.randn(batch, unet.config.in_channels, size, size, generator=generator)
    timesteps = torch.randint(0, 1000, (batch,), generator=generator)
    states = torch.randn(batch, 77, unet.config.cross_attention_dim, generator=generator)
    (part,) = tuner.parts()
    layout = FeatureCacheLayout.of(describe_base(unet), part.taps, [(size, size)], 1, "fp16")
    features: TapFeatures = record_features(unet, part.taps, noisy, timesteps, encoder_hidden_states=states)
    cached = features.to(torch.device("cpu"), torch.float16)
    optimizer = torch.optim.AdamW(tuner.parameters())

    def learn(prediction: torch.Tensor) -> None:
        prediction.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def with_base() -> None:
        with attach(unet, tuner):
            learn(unet(noisy, timesteps, states, return_dict=False)[0])

    def from_features() -> None:
        learn(predict_from_features(unet, tuner, cached.to(torch.device("cpu"), torch.float32)))

    seconds = timed({"with the base": with_base, "from features": from_features}, rounds)
    ratio = seconds["from features"] / seconds["with the base"]
    shape = {"what": what, "batch": batch, "size": size, "bytes_per_draw": layout.bytes}
    return [{"part": "time", **shape, "seconds": seconds, "ratio": ratio}]


def time_of_sweep(ratios: Sequence[str], rounds: int, work: Path) -> list[Row]:
    """Compare a step of several bypass tuners on one shared forward pass of the base with a step of each alone."""
    images = work / "images"
    images.mkdir()
    for number in range(8):
        Image.effect_noise((64, 64), 60 + number).convert("RGB").save(images / f"{number}.png")
    config = settings(
        images, work / "out", prompt="noise", steps=rounds + 1, sweep=f"ratio={','.join(ratios)}", batch_size=8
    )
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    with inputs_of(config) as (accelerator, inputs):
        configs = [variant.config for variant in parse_sweep(config)]
        alone = [build_training_state(each, accelerator, inputs) for each in configs]
        for run in alone:
            with acting(run):
                seconds["alone"].append(train_on(run))
        runs = [build_training_state(each, accelerator, inputs) for each in configs]
        share_passes(runs)
        courses = [steps_of(run, []) for run in runs]
        for number in range(rounds + 1):
            started = time.process_time()
            for course in courses:
                next(course)
            if number:
                seconds["together"].append(time.process_time() - started)
        same = all(
            torch.equal(mine, other)
            for one, two in zip(alone, runs, strict=True)
            for mine, other in zip(one.tuner.parameters(), two.tuner.parameters(), strict=True)
        )
    each, together = sum(seconds["alone"]), median(seconds["together"])
    what = {"what": "restune-tiny", "tuners": len(ratios), "batch": 8, "equal": same}
    return [{"part": "sweep", **what, "alone": each, "together": together, "ratio": together / each}]


def merged(path: Path, rows: list[Row], part: str) -> list[Row]:
    """Return the rows of a results file with the rows of one part replaced."""
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    seeds = {row.get("seed", row.get("what")) for row in rows}
    kept = [row for row in known if row["part"] != part or row.get("seed", row.get("what")) not in seeds]
    return [*kept, *rows]


def table(rows: list[Row]) -> list[str]:
    """Return the lines of the Markdown tables of all parts."""
    lines: list[str] = []
    quality = [row for row in rows if row["part"] == "quality"]
    if quality:
        seeds = sorted({row["seed"] for row in quality})
        lines += [
            f"Denoising loss on 48 held-out images of {STYLE} after {quality[0]['steps']} steps at batch size 8 on 24 "
            f"images, learning rate {LEARNING_RATE:g}, seeds {seeds}; lower is better.",
            "",
            "| noise samples per image | loss | over no cache | processor time of a step, ms |",
            "|---|---|---|---|",
        ]
        plain = {row["seed"]: row["loss"] for row in quality if row["bank"] == "none"}
        for samples in ("before training", "none", *SIZES):
            chosen = [row for row in quality if row["bank"] == samples]
            if not chosen:
                continue
            ratios = [row["loss"] / plain[row["seed"]] for row in chosen]
            spread = f" ± {stdev(ratios):.4f}" if len(ratios) > 1 else ""
            step = [row["seconds"] for row in chosen if "seconds" in row]
            shown = f"{1000 * median(step):.0f}" if step else ""
            loss = mean(row["loss"] for row in chosen)
            lines.append(f"| {samples} | {loss:.4f} | {mean(ratios):.4f}{spread} | {shown} |")
        lines.append("")
    times = [row for row in rows if row["part"] == "time"]
    if times:
        lines += [
            "| base | batch | latent | step with the base, s | step from features, s | ratio "
            "| disk per noise sample, fp16 |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in times:
            base, features = row["seconds"]["with the base"], row["seconds"]["from features"]
            lines.append(
                f"| {row['what']} | {row['batch']} | {row['size']}x{row['size']} | {base:.3f} | {features:.3f} | "
                f"{row['ratio']:.3f} | {row['bytes_per_draw'] / 2**20:.2f} MiB |"
            )
        lines.append("")
    swept = [row for row in rows if row["part"] == "sweep"]
    if swept:
        lines += [
            "| base | bypass tuners | batch | separate, s/step | together, s/step | ratio | bit-identical |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in swept:
            lines.append(
                f"| {row['what']} | {row['tuners']} | {row['batch']} | {row['alone']:.3f} | {row['together']:.3f} | "
                f"{row['ratio']:.3f} | {'yes' if row['equal'] else 'no'} |"
            )
        lines.append("")
    return lines


def main() -> None:
    """Run one part and add its rows to the results of the other parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=["quality", "time", "size", "sweep"])
    parser.add_argument("--icons", type=Path, default=Path("data/icons"), help="folder written by prepare_icons")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default: 200)")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each variant (default: 9)")
    parser.add_argument("--output", type=Path, required=True, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def add(rows: list[Row]) -> None:
        every = merged(arguments.output.with_suffix(".json"), rows, rows[0]["part"])
        publish("benchmarks.feature_cache", every, table(every), "the last part that was measured", arguments.output)

    if arguments.part == "quality":
        for seed in arguments.seeds:
            with TemporaryDirectory() as work:
                add(quality_of_seed(arguments.icons, seed, arguments.steps, Path(work)))
    elif arguments.part == "time":
        tiny = UNet2DConditionModel.from_pretrained(TINY / "unet")
        add(time_of_steps(tiny, "restune-tiny", 8, tiny.config.sample_size, arguments.rounds))
    elif arguments.part == "sweep":
        with TemporaryDirectory() as work:
            add(time_of_sweep(("0.0625", "0.125", "0.25", "0.5"), arguments.rounds, Path(work)))
    else:
        torch.manual_seed(0)
        add(time_of_steps(UNet2DConditionModel(**SD15), "SD 1.5's size", 1, 32, arguments.rounds))


if __name__ == "__main__":
    main()
