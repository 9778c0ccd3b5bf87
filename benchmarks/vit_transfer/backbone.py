"""The vision transformer backbone, pretrained on the concepts of five icon styles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ViTConfig, ViTModel

from benchmarks.icon_style.data import IconData
from benchmarks.icon_style.judges import disturb_shapes, kept
from research.restune_tiny.icon_sources import PRETRAINING_SETS


@dataclass(frozen=True)
class Shape:
    """Size of the backbone and of its pretraining."""

    width: int = 64
    layers: int = 4
    heads: int = 4
    image: int = 32
    patch: int = 8
    steps: int = 3000
    batch: int = 128


class Recognizer(nn.Module):
    """A `ViTModel` with a linear classifier of concepts: N x 3 x S x S in [0, 1] to N x classes."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        config = ViTConfig(
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=2 * shape.width,
            image_size=shape.image,
            patch_size=shape.patch,
        )
        self.vit: Any = ViTModel(config, add_pooling_layer=False)
        self.head = nn.Linear(shape.width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(read_out(self.vit, images))
        return logits


def read_out(vit: Any, images: Tensor) -> Tensor:
    """Return the input of every head, N x width: the mean of the last hidden state over all tokens.

    The class token alone would exclude the patch tokens for a bypass, which does not mix tokens.
    """
    return pooled(vit(pixel_values(images)).last_hidden_state)


def pixel_values(images: Tensor) -> Tensor:
    """Return images in [0, 1] scaled to the backbone's input range [-1, 1]."""
    return images * 2 - 1


def pooled(state: Tensor) -> Tensor:
    """Return the mean of a last hidden state (N, tokens, width) over all tokens, N x width."""
    return state.mean(1)


def shrink(images: Tensor, side: int) -> Tensor:
    """Return square images resized to `side`."""
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


def concept_rows(data: IconData) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the pretraining concepts and their (concept, style) pairs, without test concepts."""
    concepts = sorted(set(data.known) - set(data.test))
    rows = [(c, style) for style in PRETRAINING_SETS for c in concepts if c in data.styles[style].concepts]
    return concepts, rows


def pretrain(data: IconData, shape: Shape, seed: int = 0) -> Recognizer:
    """Train the backbone to classify the concept of an image, under changes of style, position, size and colors."""
    concepts, rows = concept_rows(data)
    images = torch.cat([shrink(data.styles[style].pixels([c]), shape.image) for c, style in rows])
    number = {concept: index for index, concept in enumerate(concepts)}
    labels = torch.tensor([number[concept] for concept, _ in rows])
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Recognizer(shape, len(concepts)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=shape.steps, pct_start=0.1)
        for _ in tqdm(range(shape.steps), desc=f"{len(concepts)} concepts", leave=False):
            picks = torch.randint(len(labels), (shape.batch,), generator=generator)
            logits = model(disturb_shapes(images[picks], generator))
            loss = F.cross_entropy(logits, labels[picks], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def load_recognizer(data: IconData, shape: Shape, folder: Path) -> Recognizer:
    """Load the backbone from a folder, or pretrain it and save it there."""
    concepts, _ = concept_rows(data)
    facts = {"shape": vars(shape), "classes": concepts}
    model = kept(folder / "backbone", facts, Recognizer(shape, len(concepts)), lambda: pretrain(data, shape))
    assert isinstance(model, Recognizer)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def recognized(model: Recognizer, data: IconData, style: str, shape: Shape) -> float:
    """Return the accuracy of the backbone on a style's images of pretraining concepts."""
    concepts, _ = concept_rows(data)
    shown = [index for index, concept in enumerate(concepts) if concept in data.styles[style].concepts]
    images = shrink(data.styles[style].pixels([concepts[index] for index in shown]), shape.image)
    guesses = torch.cat([model(part).argmax(1) for part in images.split(128)])
    return (guesses == torch.tensor(shown)).float().mean().item()
