"""Training batches of the text and U-Net stages: stored latents with captions."""

from __future__ import annotations

import argparse
import random

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from research.restune_tiny.palette import COLOURS
from research.restune_tiny.parts.captions import Captions
from research.restune_tiny.parts.icons import VARIANT_WEIGHTS, load_icons


def caption_source(settings: argparse.Namespace) -> Captions:
    """Return the captions of the icons."""
    return Captions(load_icons(settings.icons).records, CLIPTokenizer.from_pretrained(settings.tokenizer))


def held_out_icons(count: int, share: float) -> Tensor:
    """Return the numbers of the icons that a stage does not train on: the same ones in each run.

    Args:
        count: number of icons.
        share: fraction of them, from 0 to 1.
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[: round(count * share)].sort().values


class Examples:
    """Random batches of latents with captions."""

    def __init__(self, settings: argparse.Namespace) -> None:
        self.captions = caption_source(settings)
        data = load_file(settings.work / "latents.safetensors")
        self.latents, self.colours = data["latents"], data["colours"]
        self.seed = data.get("seed")  # files of earlier versions lack it
        self.chances = load_icons(settings.icons).weights
        # Stages without held-out icons lack the option.
        self.held_out = held_out_icons(len(self.chances), getattr(settings, "held_out", 0.0))
        self.chances[self.held_out] = 0
        self.variant_chances, self.palette = torch.tensor(settings.variants or VARIANT_WEIGHTS), list(COLOURS)

    def batch(self, seed: int, size: int) -> tuple[Tensor, Tensor, list[int]]:
        """Return latents, compact ids and icon indices; also seeds torch's global generator."""
        torch.manual_seed(seed)
        rng = random.Random(seed)
        picks = torch.multinomial(self.chances, size, replacement=True)
        shapes = torch.multinomial(self.variant_chances, size, replacement=True)
        shades = self.colours[picks, shapes].tolist()
        chosen = list(zip(picks.tolist(), shades, strict=True))
        prompts = [self.captions.draw(self.captions.records[i], self.palette[shade], rng) for i, shade in chosen]
        return self.latents[picks, shapes].float(), self.captions.ids(prompts), picks.tolist()
