"""Stage that pretrains the text encoder."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from research.restune_tiny.parts.examples import Examples, caption_source
from research.restune_tiny.parts.folders import write_tensors
from research.restune_tiny.parts.networks import TEXT_WIDTH, new_text_encoder
from research.restune_tiny.parts.precision import TRAINING_DTYPE
from research.restune_tiny.parts.trainer import Trainer, micro_seed

TEXT_LENGTH = 40  # tokens in the pretraining of the text encoder; later positions start as padding


class TextMatcher(nn.Module):
    """A text encoder with heads that predict the latents of a caption's image and match captions to images."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.text_encoder = new_text_encoder(vocabulary)
        self.look = nn.Linear(TEXT_WIDTH, 1024)
        self.text_side, self.picture_side = nn.Linear(TEXT_WIDTH, 96), nn.Linear(1024, 96)

    def forward(self, ids: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predicted latents, and scaled similarities (captions by images)."""
        # The mean over all positions: the U-Net first attends to all equally, and most of them are padding.
        summary = self.text_encoder(ids).last_hidden_state.mean(1)
        ours = F.normalize(self.text_side(summary), dim=-1)
        theirs = F.normalize(self.picture_side(images), dim=-1)
        return self.look(summary), 12 * ours @ theirs.T


@dataclass
class TextJob:
    """Pretrain the text encoder before the U-Net; with a random one the U-Net learns to use captions very late."""

    settings: argparse.Namespace
    dtype: torch.dtype = TRAINING_DTYPE

    def build(self) -> nn.Module:
        """Return a new text encoder with its heads."""
        captions = caption_source(self.settings)
        torch.manual_seed(self.settings.seed)
        return TextMatcher(len(captions.used))

    def prepare(self, module: nn.Module) -> Callable[[int, int], dict[str, float]]:
        """Load the latents and return a function that runs one micro-batch."""
        settings, draw = self.settings, Examples(self.settings)

        def run(step: int, index: int) -> dict[str, float]:
            latents, ids, records = draw.batch(micro_seed(settings.seed + 3, step, index), settings.batch)
            flat = latents.flatten(1)
            look, similarity = module(ids[:, :TEXT_LENGTH], flat.to(TRAINING_DTYPE))
            error = F.mse_loss(look.float(), flat)
            # Images of one icon are one target.
            same = torch.tensor(records)
            share = (same[:, None] == same[None]).float()
            named = ids[:, 1] != ids[:, -1]
            chosen = F.cross_entropy(similarity.float(), share / share.sum(1, keepdim=True), reduction="none")
            match = (chosen * named).sum() / named.sum().clamp(min=1)
            (error + 0.3 * match).backward()
            return {"error": float(error.detach()), "match": float(match.detach())}

        return run


def train_text(arguments: argparse.Namespace) -> None:
    """Train only the text encoder and write `<work>/text.safetensors`, the initialization of the U-Net stage."""

    def export(weights: dict[str, Tensor]) -> None:
        own = {key.split(".", 1)[1]: value for key, value in weights.items() if key.startswith("text_encoder.")}
        positions = next(value for key, value in own.items() if key.endswith("position_embedding.weight"))
        positions[TEXT_LENGTH:] = positions[TEXT_LENGTH - 1]  # all padding alike
        write_tensors(own, arguments.work / "text.safetensors")

    Trainer(TextJob(arguments), arguments, ("error", "match")).run(export, export_every=100)
