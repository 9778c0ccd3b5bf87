"""Judges of the benchmark: classifiers of concept and of style, trained on the true images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from research.restune_tiny.icon_sources import PRETRAINING_SETS
from research.restune_tiny.parts.precision import FAST_BFLOAT16

from .data import IconData
from .style_features import StyleFeatures

RIDGE = 0.01
"""Chosen among 0.003, 0.01, 0.03 and 0.2 by the accuracy on true images of 160 held-out concepts."""


class Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut; stride 2 halves the resolution."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        same = stride == 1 and channels == out_channels
        self.shortcut: nn.Module = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the next level."""
        return F.relu(self.body(x) + self.shortcut(x))


class IconClassifier(nn.Module):
    """A small residual network for 64 px images: N x 3 x 64 x 64 in [0, 1] to N x classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 48, 5, 2, 2, bias=False), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.levels = nn.Sequential(
            Residual(48, 64, 1), Residual(64, 128, 2), Residual(128, 128, 1), Residual(128, 256, 2)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.levels(self.stem(images * 4 - 2)))
        return logits


class StyleClassifier(nn.Module):
    """A linear style classifier on palette and texture features: N x 3 x 64 x 64 in [0, 1] to N x classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = StyleFeatures()
        self.mean: Tensor
        self.spread: Tensor
        self.register_buffer("mean", torch.zeros(self.features.size))
        self.register_buffer("spread", torch.ones(self.features.size))
        self.head = nn.Linear(self.features.size, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.weigh(self.features(images))

    def weigh(self, features: Tensor) -> Tensor:
        """Return the logits for N x `StyleFeatures.size` features."""
        logits: Tensor = self.head((features - self.mean) / self.spread)
        return logits


def warp(images: Tensor, generator: torch.Generator, *, degrees: float, zoom: float, shift: float) -> Tensor:
    """Rotate, scale and shift every image at random; new areas get the border color."""
    count = len(images)

    def spread(reach: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * reach

    angle, scale = spread(degrees / 57.3), 1 + spread(zoom)
    turn = torch.stack(
        [angle.cos() * scale, -angle.sin() * scale, spread(shift), angle.sin() * scale, angle.cos() * scale,
         spread(shift)], 1
    ).view(count, 2, 3)  # fmt: skip
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def disturb_shapes(images: Tensor, generator: torch.Generator) -> Tensor:
    """Augment images in ways that keep the concept but not the style: position, size, angle, colors, sharpness."""
    count = len(images)
    images = warp(images, generator, degrees=15, zoom=0.2, shift=0.12)
    mixing = torch.eye(3) + 0.25 * torch.randn(count, 3, 3, generator=generator)
    grey = torch.rand(count, 1, 1, generator=generator) < 0.1
    mixing = torch.where(grey, torch.full((3, 3), 1 / 3), mixing)
    # Mix the inverted colors so that white stays white.
    images = 1 - torch.einsum("nij,njhw->nihw", mixing, 1 - images)
    return roughen(images, generator, 0.06)


def roughen(images: Tensor, generator: torch.Generator, noise: float) -> Tensor:
    """Blur half of the images and add noise of random strength."""
    count = len(images)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(count, 1, 1, 1, generator=generator) * (torch.rand(count, 1, 1, 1, generator=generator) < 0.5)
    strength = noise * torch.rand(count, 1, 1, 1, generator=generator)
    rough = images.lerp(soft, share) + strength * torch.randn(images.shape, generator=generator)
    return rough.clamp(0, 1)


Disturb = Callable[[Tensor, torch.Generator], Tensor]


def fit_classifier(
    kind: Callable[[int], nn.Module],
    images: Tensor,
    labels: Tensor,
    classes: int,
    disturb: Disturb,
    *,
    epochs: int,
    seed: int,
    batch: int = 64,
) -> nn.Module:
    """Train a classifier.

    Args:
        kind: function from a number of classes to a network.
        images: V x N x 3 x 64 x 64 in [0, 1]: V renderings of every image; each use picks one at random.
        labels: N class numbers.
        classes: number of classes.
        disturb: random augmentation of a batch.
        epochs: number of epochs.
        seed: seed of weights, order and augmentation.
        batch: batch size.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(classes).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
        steps = epochs * (len(labels) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.2)
        for _ in tqdm(range(epochs), desc=f"classifier of {classes} classes", leave=False):
            order = torch.randperm(len(labels), generator=generator)
            for start in range(0, len(labels) - batch + 1, batch):
                picks = order[start : start + batch]
                versions = torch.randint(len(images), (batch,), generator=generator)
                changed = disturb(images[versions, picks], generator).contiguous(memory_format=torch.channels_last)
                with torch.autocast("cpu", torch.bfloat16, enabled=FAST_BFLOAT16):
                    loss = F.cross_entropy(model(changed), labels[picks], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    # The contiguous format gives bit-identical results to the loaded model.
    model = model.to(memory_format=torch.contiguous_format)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def fit_style_classifier(images: Tensor, labels: Tensor, classes: int, *, ridge: float = RIDGE) -> StyleClassifier:
    """Fit the style classifier in closed form: least squares on one-hot labels with a ridge (Hoerl and Kennard 1970).

    Args:
        images: V x N x 3 x 64 x 64 in [0, 1]: V renderings of every image; all are used.
        labels: N class numbers.
        classes: number of classes.
        ridge: weight of the squared coefficients, per image.
    """
    model = StyleClassifier(classes)
    parts = tqdm(images.flatten(0, 1).split(64), desc="palettes and textures", leave=False)
    features = torch.cat([model.features(part) for part in parts])
    model.mean.copy_(features.mean(0))
    model.spread.copy_(features.std(0) + 1e-3)
    known = (features - model.mean) / model.spread
    wanted = F.one_hot(labels, classes).float().repeat(len(images), 1)
    model.head.bias.copy_(wanted.mean(0))
    square = known.T @ known + ridge * len(known) * torch.eye(known.shape[1])
    model.head.weight.copy_(torch.linalg.solve(square, known.T @ (wanted - wanted.mean(0))).T)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def classify(model: nn.Module, images: Tensor, batch: int = 128) -> Tensor:
    """Return the logits of N x 3 x 64 x 64 images in [0, 1]."""
    return torch.cat([model(part) for part in images.split(batch)])


@dataclass(frozen=True)
class Judges:
    """A concept classifier and a style classifier with the names of their classes.

    The concept classifier is trained on the five pretraining styles only; its accuracy on the true images of a
    development style is the upper bound for a tuner. The style classifier is trained on all seven styles, without the
    test concepts.
    """

    concept: nn.Module
    style: nn.Module
    concepts: list[str]
    styles: list[str]

    def concept_ranks(self, images: Tensor, concepts: Sequence[str]) -> Tensor:
        """Return the rank of the true concept of each image among all classes (0: recognized)."""
        logits = classify(self.concept, images)
        wanted = torch.tensor([self.concepts.index(concept) for concept in concepts])
        return (logits > logits.gather(1, wanted[:, None])).sum(1)

    def style_of(self, images: Tensor) -> list[str]:
        """Return the most probable style of each image."""
        return [self.styles[index] for index in classify(self.style, images).argmax(1).tolist()]


@torch.no_grad()
def through_autoencoder(vae: Any, images: Tensor, level: float, seed: int, batch: int = 32) -> Tensor:
    """Encode and decode images with noise on the latents, which imitates the error of a denoiser's latents.

    Args:
        vae: VAE of the base.
        images: N x 3 x 64 x 64 in [0, 1].
        level: largest standard deviation of the noise, in standard deviations of the latents.
        seed: seed of the noise.
        batch: batch size.
    """
    generator = torch.Generator().manual_seed(seed)
    results = []
    for part in tqdm(images.split(batch), desc="images through the VAE", leave=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=FAST_BFLOAT16):
            latents = vae.encode(part * 2 - 1).latent_dist.mean
            noise = torch.randn(latents.shape, generator=generator) * latents.float().std()
            share = level * torch.rand(len(part), 1, 1, 1, generator=generator)
            decoded = vae.decode(latents + share * noise).sample
        results.append((decoded.float() / 2 + 0.5).clamp(0, 1))
    return torch.cat(results)


LEVELS = {"concept": 0.15, "style": 0.3}


def load_judges(
    data: IconData, vae: Any, folder: Path, *, epochs: int = 30, decoded: bool = True, seed: int = 0
) -> Judges:
    """Load the classifiers from a folder, or train them and save them there.

    Args:
        data: the icon sets.
        vae: VAE of the base. Half of the training images are VAE reconstructions, so that the judges do not respond
            to VAE artifacts.
        folder: folder of the saved weights.
        epochs: epochs of the concept classifier; the style classifier has a closed-form solution.
        decoded: whether to train on VAE reconstructions too; without them training is faster and the judges are less
            fair.
        seed: seed of both classifiers.
    """
    concepts, styles = data.known, list(data.styles)
    known, test = set(concepts), set(data.test)
    rows = [(concept, name) for name in styles for concept in sorted(data.styles[name].concepts & known)]

    def concept_judge() -> nn.Module:
        chosen = [(concept, name) for concept, name in rows if name in PRETRAINING_SETS]
        labels = torch.tensor([concepts.index(concept) for concept, _ in chosen])
        images = versions(data, vae if decoded else None, chosen, LEVELS["concept"], seed)
        return fit_classifier(IconClassifier, images, labels, len(concepts), disturb_shapes, epochs=epochs, seed=seed)

    def style_judge() -> nn.Module:
        chosen = [(concept, name) for concept, name in rows if concept not in test]
        labels = torch.tensor([styles.index(name) for _, name in chosen])
        images = versions(data, vae if decoded else None, chosen, LEVELS["style"], seed)
        return fit_style_classifier(images, labels, len(styles))

    facts = {"epochs": epochs, "seed": seed, "test": data.test} | ({} if decoded else {"decoded": False})
    concept = kept(
        folder / "concept-judge", facts | {"classes": concepts}, IconClassifier(len(concepts)), concept_judge
    )
    about_style = facts | {"classes": styles, "ridge": RIDGE}
    style = kept(folder / "style-judge", about_style, StyleClassifier(len(styles)), style_judge)
    return Judges(concept, style, concepts, styles)


def versions(data: IconData, vae: Any, rows: Sequence[tuple[str, str]], level: float, seed: int) -> Tensor:
    """Return the images of (concept, style) pairs and their VAE reconstructions: V x N x 3 x 64 x 64."""
    images = torch.cat([data.styles[name].pixels([concept]) for concept, name in rows])
    if vae is None:
        return images[None]
    return torch.stack([images, through_autoencoder(vae, images, level, seed)])


def kept(path: Path, facts: dict[str, Any], empty: nn.Module, train: Callable[[], nn.Module]) -> nn.Module:
    """Load a network from a file recorded with the same facts, or train one and save it there."""
    weights, about = path.with_suffix(".safetensors"), path.with_suffix(".json")
    if weights.exists() and about.exists() and json.loads(about.read_text()) == facts:
        empty.load_state_dict(load_file(weights))
        return empty.eval().requires_grad_(False)
    model = train()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights)
    about.write_text(json.dumps(facts))
    return model
