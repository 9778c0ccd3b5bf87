"""Compare our training with diffusers' LoRA script: images per second and memory, on one base and one set of images.

    python -m benchmarks.training_lora --output benchmarks/results/training_lora

Our training is `restune_diffusion.training.train`. The peer is `benchmarks.diffusers_lora` in two variants: the
original script, which encodes image and caption in every step, and one with both encoded before the first step, as in
our training. All methods run in one process, in turn, and each round gives ratios to the script in the same round.
Processor times are more reliable than wall-clock times, which other programs affect. There are two bases: the bundled
one, and one of Stable Diffusion 1.5's size with random weights.

Memory has two measures. "Kept for backward" is the number of bytes that autograd saves in one forward pass, without
parameters; it is the same on every machine. "Process grows by" is the peak growth of a new process during training,
beyond the loaded base.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.backward_memory import SD15
from benchmarks.diffusers_lora import Settings, train_lora
from benchmarks.results_file import publish
from restune_diffusion import ResConfig
from restune_diffusion.data.captions import find_examples
from restune_diffusion.hooks.manager import TunerManager
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.advice.memory_estimate import kept_storages

ASSETS = Path(__file__).parents[1] / "restune_diffusion" / "assets"
IMAGES = ASSETS / "demo"
RANK = 4
_PEER_SCRIPT = f"LoRA r={RANK}, diffusers' script"

Train = Callable[[Any, "Race", int, Callable[[Any], None]], None]


@dataclass(frozen=True)
class Race:
    """Base, resolution, batch size and length of one comparison."""

    base: str
    resolution: int
    batch: int
    steps: int
    rounds: int


RACES = (
    Race("restune-tiny", 64, batch=4, steps=10, rounds=5),
    Race("SD 1.5's size, random weights", 256, batch=1, steps=2, rounds=3),
)


def ours(**settings: Any) -> Train:
    """Return a function that trains a tuner of ours with these settings."""

    def run(pipeline: Any, race: Race, steps: int, on_step: Callable[[Any], None]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(
                base=race.base, data=IMAGES, output=Path(folder), resolution=race.resolution, steps=steps,
                batch_size=race.batch, checkpoint_every=0, cpu=True, **settings,
            )  # fmt: skip
            train(config, pipeline=pipeline, verbose=False, on_progress=on_step)

    return run


def peer(cached: bool) -> Train:
    """Return a function that trains LoRA as diffusers' script does."""

    def run(pipeline: Any, race: Race, steps: int, on_step: Callable[[Any], None]) -> None:
        settings = Settings(race.resolution, steps, race.batch, RANK, cached=cached)
        train_lora(pipeline, find_examples(IMAGES), settings, on_step)

    return run


_SAME_LORA = ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=RANK)
CONTESTANTS: dict[str, Train] = {
    _PEER_SCRIPT: peer(cached=False),
    f"LoRA r={RANK}, encoded beforehand": peer(cached=True),
    "skip (default)": ours(tuner="skip"),
    "bypass (default)": ours(tuner="bypass"),
    "res, adapters (default)": ours(tuner="res"),
    f"res, the same LoRA r={RANK}": ours(tuner="res", res=_SAME_LORA),
}


def load(race: Race) -> StableDiffusionPipeline:
    """Return the bundled base, or a base of Stable Diffusion 1.5's size with random weights; fp32."""
    bundled = StableDiffusionPipeline.from_pretrained(str(ASSETS / "restune-tiny"))
    if race.base == "restune-tiny":
        return bundled
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        vocab_size=49408, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=bundled.tokenizer,
        unet=UNet2DConditionModel(**SD15).eval(),
        scheduler=DDIMScheduler.from_config(bundled.scheduler.config, prediction_type="epsilon"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def twin(pipeline: Any) -> Any:
    """Return a pipeline whose U-Net has separate modules but shared weights, because PEFT does not remove wrappers."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(pipeline.unet.config)
    unet.load_state_dict(pipeline.unet.state_dict(), assign=True)
    parts = {**pipeline.components, "unet": unet.eval()}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


@dataclass
class Clock:
    """Progress callback that records wall-clock and processor time after each step."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def __call__(self, _: Any) -> None:
        """Record the current times."""
        self.wall.append(time.perf_counter())
        self.processor.append(time.process_time())


def seconds_per_step(times: Sequence[float]) -> float:
    """Return the median interval of the recorded times; the time before the first one is preparation and warm-up."""
    return median(after - before for before, after in pairwise(times))


def kept_for_backward(run: Train, pipeline: Any, race: Race) -> tuple[int, int]:
    """Return the bytes that autograd saves in one step, without parameters, and the number of trained parameters."""
    trained: list[int] = []

    def leave_parameters_out(_: Any) -> None:
        manager = TunerManager.of(pipeline.unet)
        tuners = [] if manager is None else [manager.tuner(name) for name in manager.names]
        parameters = [each for module in (pipeline.unet, *tuners) for each in module.parameters()]
        trained.append(sum(each.numel() for each in parameters if each.requires_grad))
        for parameter in parameters:
            storages.pop(parameter.untyped_storage()._cdata, None)

    with kept_storages() as storages:
        run(pipeline, race, 1, leave_parameters_out)
    return sum(storage.nbytes() for storage in storages.values()), trained[0]


@contextmanager
def growth() -> Iterator[list[int]]:
    """Context manager that measures the peak memory growth of this process inside it.

    Yields a list with one number, the growth in bytes, which is set on exit.
    """
    process, stopped = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    result, peak = [0], [before]

    def watch() -> None:
        while not stopped.wait(0.005):
            peak.append(max(peak.pop(), process.memory_info().rss))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield result
    finally:
        stopped.set()
        thread.join()
        result[0] = max(peak) - before


def grown_in_a_fresh_process(name: str, race: Race) -> int:
    """Return the memory growth of a new process that only loads the base and trains it for two steps, in bytes."""
    arguments = [sys.executable, "-m", "benchmarks.training_lora", "--growth", json.dumps([name, race.base])]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def measure(race: Race) -> list[dict[str, Any]]:
    """Run all methods in turn and return one row for each."""
    pipeline = load(race)
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        model.requires_grad_(False)
    pipelines = {name: twin(pipeline) if name.startswith("LoRA") else pipeline for name in CONTESTANTS}
    rows: dict[str, dict[str, Any]] = {}
    for name, run in CONTESTANTS.items():
        kept, parameters = kept_for_backward(run, pipelines[name], race)
        rows[name] = {"base": race.base, "method": name, "parameters": parameters, "kept_bytes": kept}
    wall: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    processor: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(race.rounds):
        for name, run in CONTESTANTS.items():
            clock = Clock()
            run(pipelines[name], race, race.steps + 1, clock)
            wall[name].append(seconds_per_step(clock.wall))
            processor[name].append(seconds_per_step(clock.processor))
    for name, row in rows.items():
        row["images_per_second"] = race.batch / median(processor[name])
        row["images_per_wall_second"] = race.batch / median(wall[name])
        for key, times in (("speed", processor), ("wall_speed", wall)):
            row[key] = median(p / own for p, own in zip(times[_PEER_SCRIPT], times[name], strict=True))
        row["kept"] = row["kept_bytes"] / rows[_PEER_SCRIPT]["kept_bytes"]
    del pipeline, pipelines
    for name, row in rows.items():
        row["grown_bytes"] = grown_in_a_fresh_process(name, race)
        row["grown"] = row["grown_bytes"] / rows[_PEER_SCRIPT]["grown_bytes"]
    return list(rows.values())


def table(race: Race, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table; every ratio is to diffusers' script."""
    lines = [
        f"**{race.base}**, {race.resolution} px, batch {race.batch}, {race.rounds} rounds of {race.steps} steps",
        "",
        "| method | parameters | images/s (processor) | ratio | images/s (clock) | ratio "
        "| kept for backward, MiB | ratio | process grows by, MiB | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['method']} | {r['parameters'] / 1e6:.2f}M | {r['images_per_second']:.2f} | {r['speed']:.2f} "
            f"| {r['images_per_wall_second']:.2f} | {r['wall_speed']:.2f} | {r['kept_bytes'] / 2**20:.1f} "
            f"| {r['kept']:.2f} | {r['grown_bytes'] / 2**20:.0f} | {r['grown']:.2f} |"
        )
    return [*lines, ""]


def main() -> None:
    """Run the comparison on every base, print the tables and write them with the command, machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bases", type=int, default=len(RACES), help="number of bases, the small one first")
    parser.add_argument("--rounds", type=int, help="training runs of each method")
    parser.add_argument("--growth", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.growth:
        name, base = json.loads(arguments.growth)
        race = next(each for each in RACES if each.base == base)
        pipeline = load(race)
        with growth() as grown:
            CONTESTANTS[name](pipeline, race, 2, lambda _: None)
        print(grown[0])
        return
    rows: list[dict[str, Any]] = []
    lines: list[str] = []
    for race in RACES[: arguments.bases]:
        race = replace(race, rounds=arguments.rounds or race.rounds)
        measured = measure(race)
        rows += measured
        lines += table(race, measured)
    publish("benchmarks.training_lora", rows, lines, "fp32, every ratio to diffusers' script", arguments.output)


if __name__ == "__main__":
    main()
