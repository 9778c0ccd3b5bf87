"""A small classifier of latents: style and concept."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from research.restune_tiny.icon_sources import PRETRAINING_SETS
from research.restune_tiny.parts.folders import write_tensors
from research.restune_tiny.parts.icons import load_icons

CHANNELS = 96
NOISE = 1.2
"""Maximum noise in the training of the judge, in standard deviations of the latents.

A judge trained with noise responds to colors and shapes; the gradient of one trained without noise is mostly noise.
"""


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape."""
        found: Tensor = x + self.body(x)
        return found


class LatentJudge(nn.Module):
    """Classifier of scaled latents, N x 16 x 8 x 8, to style logits, N x styles, and concept logits, N x concepts.

    It shares neither weights nor features with the judges of `benchmarks/icon_style`, which classify images.
    """

    def __init__(self, concepts: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(16, CHANNELS, 3, padding=1)
        self.near = nn.Sequential(Block(CHANNELS), Block(CHANNELS))
        self.far = nn.Sequential(nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, stride=2, padding=1), Block(2 * CHANNELS))
        self.style = nn.Sequential(nn.Dropout(0.2), nn.Linear(4 * CHANNELS, len(PRETRAINING_SETS)))
        self.concept = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(2 * CHANNELS * 4, concepts))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of style and concept."""
        near = self.near(self.stem(latents))
        far = F.silu(self.far(near))
        near = F.silu(near)
        # Spatial mean and standard deviation: style does not depend on position.
        texture = torch.cat([near.mean((2, 3)), near.flatten(2).std(2), far.mean((2, 3))], 1)
        return self.style(texture), self.concept(F.adaptive_avg_pool2d(far, 2))


@dataclass(frozen=True)
class Labels:
    """The classes of the icons, in the order of the stored latents."""

    styles: Tensor
    concepts: Tensor
    count: int


def label(records: Sequence[dict[str, Any]]) -> Labels:
    """Return the class numbers of the styles and concepts of records."""
    names = sorted({record["label"] for record in records})
    numbers = {name: number for number, name in enumerate(names)}
    return Labels(
        torch.tensor([PRETRAINING_SETS.index(record["set"]) for record in records]),
        torch.tensor([numbers[record["label"]] for record in records]),
        len(names),
    )


def disturbed(latents: Tensor, low: float, high: float) -> Tensor:
    """Return latents with noise of random strength between two bounds, in standard deviations of the latents."""
    strength = low + (high - low) * torch.rand(len(latents), 1, 1, 1)
    return latents + strength * torch.randn_like(latents)


def train_judge(arguments: argparse.Namespace) -> None:
    """Train the judge on the stored latents and write `<work>/judge.safetensors`."""
    labels = label(load_icons(arguments.icons).records)
    latents = load_file(arguments.work / "latents.safetensors")["latents"]
    torch.manual_seed(arguments.seed)
    judge = LatentJudge(labels.count)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=arguments.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.lr, total_steps=arguments.steps, pct_start=0.1)
    for step in range(1, arguments.steps + 1):
        picks = torch.randint(len(latents), (arguments.batch,))
        shapes = torch.randint(2, (arguments.batch,))  # original and shifted variants
        style, concept = judge(disturbed(latents[picks, shapes].float(), 0, NOISE))
        style_loss = F.cross_entropy(style, labels.styles[picks], label_smoothing=0.05)
        concept_loss = F.cross_entropy(concept, labels.concepts[picks], label_smoothing=0.05)
        optimizer.zero_grad()
        (style_loss + 0.3 * concept_loss).backward()
        optimizer.step()
        schedule.step()
        if step % arguments.print_every == 0:
            right = float((style.argmax(1) == labels.styles[picks]).float().mean())
            found = float((concept.argmax(1) == labels.concepts[picks]).float().mean())
            print(f"step {step} style {style_loss:.3f} {right:.2f} concept {concept_loss:.3f} {found:.2f}", flush=True)
    write_tensors(judge.state_dict(), arguments.work / "judge.safetensors")
