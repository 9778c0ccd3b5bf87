"""Fine-tune the bundled base fully, extract a LoRA at several ranks, and compare it with the fine-tuned model.

    python research/restune_tiny/prepare_icons.py data/icons --download --benchmark
    python -m benchmarks.extraction --icons data/icons --work work/extraction --output benchmarks/results/extraction

A second model is the fine-tuned one with the norms and biases of the base, which is all that no tuner represents. The
models and finished rows stay in the work folder and are not computed again.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.icon_style.data import IconData, write_tuning_images
from benchmarks.icon_style.methods import Trainable, held_out_loss, tune
from benchmarks.icon_style.sampling import ImageSampler
from benchmarks.results_file import publish
from restune_diffusion import attach, load_tuner, save_tuner
from restune_diffusion.backbones import describe_base, module_path
from restune_diffusion.cli.run_demo import BASE
from restune_diffusion.conversion.extraction import extract_lora
from restune_diffusion.conversion.names import unet_shapes
from restune_diffusion.conversion.products.reduction import Reduction
from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.pipelines.load_base import load_base
from restune_diffusion.training.latents.batches import Batches
from restune_diffusion.training.latents.cache import Cache, build_cache
from restune_diffusion.training.losses.objective import Objective
from restune_diffusion.utils.atomic_write import atomic_write

MODELS = {
    "`--rank 16`": Reduction(rank=16),
    "`--rank 64`": Reduction(rank=64),
    "full rank": Reduction(),
    "`--energy 0.9`": Reduction(energy=0.9),
}
ALL, WITHOUT = "all weights", "without norms and biases"
COMPARED = {ALL: ("base", "fine-tuned", *MODELS), WITHOUT: ("fine-tuned", "full rank")}
BATCH, WARMUP, PROMPTS = 8, 0.05, 12
Row = dict[str, Any]


@dataclass(frozen=True)
class Measures:
    """Held-out loss of a U-Net, its prediction for a batch of held-out images, and its samples."""

    loss: float
    prediction: torch.Tensor
    images: torch.Tensor

    def compared(self, expected: Measures) -> Row:
        """Return the loss, and the differences from the fine-tuned model: largest of the prediction, RMS of images."""
        return {
            "loss": self.loss,
            "prediction": float((self.prediction - expected.prediction).abs().max()),
            "pixels": float((self.images - expected.images).square().mean().sqrt() * 255),
        }


class Study:
    """Base, data and settings of the comparison."""

    def __init__(self, icons: Path, work: Path, style: str, steps: int, learning_rate: float) -> None:
        self.work, self.steps, self.learning_rate = work, steps, learning_rate
        self.pipeline = load_base(str(BASE), torch.float32)
        self.objective = Objective(self.pipeline.scheduler)
        data = IconData(icons)
        split = data.split(style, 0)
        self._style = data.styles[style]
        self.training = self._cache("tuning", split.tuning)
        self.held_out = self._cache("selection", split.selection)
        self.prompts = [self._style.prompt(concept) for concept in data.test[:: len(data.test) // PROMPTS][:PROMPTS]]
        self.sampler = ImageSampler(self.pipeline)
        self._expected: dict[str, Measures] = {}

    def _cache(self, name: str, concepts: list[str]) -> Cache:
        folder = write_tuning_images(self._style, concepts, self.work / name)
        return build_cache(self.pipeline, load_samples(find_examples(folder), 64))

    def tuned(self, name: str) -> Any:
        """Return the fine-tuned U-Net, and train it first if it is not in the work folder."""
        folder = self.work / name / "unet"
        if not (folder / "config.json").exists():
            (self._trained() if name == ALL else self._without_others()).save_pretrained(folder)
        return type(self.pipeline.unet).from_pretrained(folder).eval().requires_grad_(False)

    def _trained(self) -> Any:
        unet = copy.deepcopy(self.pipeline.unet).requires_grad_(True)
        batches = Batches(
            self.training,
            seed=0,
            size=BATCH,
            timesteps=self.objective.timesteps,
            caption_dropout=0.0,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        trainable = Trainable(unet, list(unet.parameters()))
        tune(trainable, batches, self.objective, steps=self.steps, learning_rate=self.learning_rate, warmup=WARMUP)
        return unet

    def _without_others(self) -> Any:
        """Return the fine-tuned U-Net with the base's tensors where LoRA cannot act."""
        unet, of_lora = self.tuned(ALL), _of_lora(self.pipeline.unet)
        before = self.pipeline.unet.state_dict()
        kept = {key: value if key in of_lora else before[key] for key, value in unet.state_dict().items()}
        unet.load_state_dict(kept)
        return unet

    @torch.no_grad()
    def measured(self, unet: Any) -> Measures:
        """Return what is compared of a U-Net."""
        latents = torch.stack([latent.mean for latent in self.held_out.latents[:BATCH]])
        states = torch.stack([self.held_out.conditioning(index).states for index in range(BATCH)])
        timesteps = torch.linspace(1, self.objective.timesteps - 1, BATCH).long()
        noisy = self.objective.add_noise(latents, torch.randn(latents.shape, generator=_seeded()), timesteps)
        return Measures(
            held_out_loss(unet, self.held_out, self.objective),
            unet(noisy, timesteps, states, return_dict=False)[0],
            self.sampler.generate(self.prompts, seed=1, unet=unet),
        )

    @cached_property
    def of_base(self) -> Measures:
        """Measures of the base."""
        return self.measured(self.pipeline.unet)

    def row(self, name: str, model: str) -> Row:
        """Return what is measured of the base, the fine-tuned model or an extraction; finished rows are kept."""
        path = self.work / name / f"{model.strip('`- ').replace(' ', '-')}.json"
        if not path.exists():
            with atomic_write(path) as file:
                file.write(json.dumps({"trained": name, "model": model, **self._measured(name, model)}).encode())
        row: Row = json.loads(path.read_text())
        return row

    def _measured(self, name: str, model: str) -> Row:
        tuned = self.tuned(name)
        if name not in self._expected:
            self._expected[name] = self.measured(tuned)
        expected = self._expected[name]
        if model not in MODELS:
            return (self.of_base if model == "base" else expected).compared(expected)
        extraction = extract_lora(str(self.work / name), str(BASE), MODELS[model])
        report, file = extraction.report, self.work / name / "extracted.safetensors"
        save_tuner(extraction.tuner, file)
        with attach(self.pipeline.unet, load_tuner(file)):
            measures = self.measured(self.pipeline.unet)
        return {
            "rank": max(layer.rank for layer in report.layers),
            **measures.compared(expected),
            "kept": report.kept,
            "left_out": {
                kind: sum(each.norm**2 for each in report.left_out if each.kind == kind) / report.total
                for kind in sorted({each.kind for each in report.left_out})
            },
            "megabytes": file.stat().st_size / 1e6,
        }


def _of_lora(unet: Any) -> set[str]:
    return {f"{module_path(site)}.weight" for site in unet_shapes(describe_base(unet))}


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def table(rows: list[Row]) -> list[str]:
    """Return the Markdown table."""
    lines = [
        "| changed | model | largest rank | change kept | held-out loss | prediction | images | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kept = f"{row['kept']:.2%}" if "kept" in row else ""
        size = f"{row['megabytes']:.1f}" if "megabytes" in row else ""
        lines.append(
            f"| {row['trained']} | {row['model']} | {row.get('rank', '')} | {kept} | {row['loss']:.5f} | "
            f"{row['prediction']:.1e} | {row['pixels']:.3f} | {size} |"
        )
    return lines


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--style", default="openmoji")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    options = parser.parse_args()
    study = Study(options.icons, options.work, options.style, options.steps, options.learning_rate)
    rows = [study.row(name, model) for name, models in COMPARED.items() for model in models]
    how = (
        f"{options.steps} steps of {BATCH} images at {options.learning_rate:g}, {len(study.training)} images in "
        f"{options.style}'s style; loss on {len(study.held_out)} held-out images. Differences from the fine-tuned "
        f"model: largest of the prediction of {BATCH} held-out images; root mean square of {PROMPTS} samples, in "
        "values from 0 to 255"
    )
    publish("benchmarks.extraction", rows, table(rows), how, options.output)


if __name__ == "__main__":
    main()
