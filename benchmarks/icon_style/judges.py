"""The benchmark's judges: small classifiers of concept and of style, trained on the artists' true pictures."""

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

from train.prepare_icons import PRETRAINING_SETS

from .data import IconData


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut; halves the picture where `stride` is 2."""

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
        """Return features of the next level."""
        return F.relu(self.body(x) + self.shortcut(x))


class IconClassifier(nn.Module):
    """A small residual network for 64 px pictures: N x 3 x 64 x 64 in [0, 1] to N x classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 48, 5, 2, 2, bias=False), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.levels = nn.Sequential(
            Residual(48, 64, 1), Residual(64, 128, 2), Residual(128, 128, 1), Residual(128, 256, 2)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, classes))

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.levels(self.stem(pictures * 4 - 2)))
        return logits


def warp(pictures: Tensor, generator: torch.Generator, *, degrees: float, zoom: float, shift: float) -> Tensor:
    """Turn, scale and move every picture at random; what comes in from outside is the border's colour."""
    count = len(pictures)

    def spread(reach: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * reach

    angle, scale = spread(degrees / 57.3), 1 + spread(zoom)
    turn = torch.stack(
        [angle.cos() * scale, -angle.sin() * scale, spread(shift), angle.sin() * scale, angle.cos() * scale,
         spread(shift)], 1
    ).view(count, 2, 3)  # fmt: skip
    grid = F.affine_grid(turn, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def disturb_shapes(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """What changes the style but not the concept: place, size, angle, colours, sharpness."""
    count = len(pictures)
    pictures = warp(pictures, generator, degrees=15, zoom=0.2, shift=0.12)
    mixing = torch.eye(3) + 0.25 * torch.randn(count, 3, 3, generator=generator)
    grey = torch.rand(count, 1, 1, generator=generator) < 0.1
    mixing = torch.where(grey, torch.full((3, 3), 1 / 3), mixing)
    # White stays white: the colours are mixed as ink.
    pictures = 1 - torch.einsum("nij,njhw->nihw", mixing, 1 - pictures)
    return roughen(pictures, generator, 0.06)


def disturb_little(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """What changes neither style nor concept: place, size, a little noise."""
    return roughen(warp(pictures, generator, degrees=4, zoom=0.1, shift=0.08), generator, 0.03)


def roughen(pictures: Tensor, generator: torch.Generator, noise: float) -> Tensor:
    """Blur half of the pictures and add noise of random strength."""
    count = len(pictures)
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(count, 1, 1, 1, generator=generator) * (torch.rand(count, 1, 1, 1, generator=generator) < 0.5)
    strength = noise * torch.rand(count, 1, 1, 1, generator=generator)
    rough = pictures.lerp(soft, share) + strength * torch.randn(pictures.shape, generator=generator)
    return rough.clamp(0, 1)


Disturb = Callable[[Tensor, torch.Generator], Tensor]


def fit_classifier(
    pictures: Tensor, labels: Tensor, classes: int, disturb: Disturb, *, epochs: int, seed: int, batch: int = 64
) -> IconClassifier:
    """Train a classifier.

    Args:
        pictures: V x N x 3 x 64 x 64 in [0, 1], V renderings of every picture, of which one is drawn each time.
        labels: N class numbers.
        classes: number of classes.
        disturb: random changes of a batch.
        epochs: passes over the pictures.
        seed: seed of weights, order and changes.
        batch: pictures of a step.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = IconClassifier(classes).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
        steps = epochs * (len(labels) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.2)
        for _ in tqdm(range(epochs), desc=f"classifier of {classes} classes", leave=False):
            order = torch.randperm(len(labels), generator=generator)
            for start in range(0, len(labels) - batch + 1, batch):
                picks = order[start : start + batch]
                versions = torch.randint(len(pictures), (batch,), generator=generator)
                changed = disturb(pictures[versions, picks], generator).contiguous(memory_format=torch.channels_last)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(model(changed), labels[picks], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def classify(model: nn.Module, pictures: Tensor, batch: int = 128) -> Tensor:
    """Return the logits of N x 3 x 64 x 64 pictures in [0, 1]."""
    return torch.cat([model(part) for part in pictures.split(batch)])


@dataclass(frozen=True)
class Judges:
    """A concept classifier and a style classifier with the names of their classes.

    The concept classifier has seen the five pretraining styles only; its accuracy on a development style's true
    pictures is the most that a tuner can reach. The style classifier has seen all seven, without the test concepts.
    """

    concept: IconClassifier
    style: IconClassifier
    concepts: list[str]
    styles: list[str]

    def concept_ranks(self, pictures: Tensor, concepts: Sequence[str]) -> Tensor:
        """How many classes are thought likelier than the true concept of each picture (0: recognised)."""
        logits = classify(self.concept, pictures)
        wanted = torch.tensor([self.concepts.index(concept) for concept in concepts])
        return (logits > logits.gather(1, wanted[:, None])).sum(1)

    def style_of(self, pictures: Tensor) -> list[str]:
        """The likeliest style of each picture."""
        return [self.styles[index] for index in classify(self.style, pictures).argmax(1).tolist()]


@torch.no_grad()
def through_autoencoder(vae: Any, pictures: Tensor, seed: int, batch: int = 32) -> Tensor:
    """Encode and decode pictures with slightly disturbed latents, as generated ones come out of the decoder."""
    generator = torch.Generator().manual_seed(seed)
    results = []
    for part in tqdm(pictures.split(batch), desc="pictures through the autoencoder", leave=False):
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(part * 2 - 1).latent_dist.mean
            noise = torch.randn(latents.shape, generator=generator) * latents.float().std()
            decoded = vae.decode(latents + 0.08 * noise).sample
        results.append((decoded.float() / 2 + 0.5).clamp(0, 1))
    return torch.cat(results)


def load_judges(data: IconData, vae: Any, folder: Path, *, epochs: int = 36, seed: int = 0) -> Judges:
    """Load the classifiers from a folder, or train them and put them there.

    Args:
        data: the pictures.
        vae: the base's autoencoder: half of the training pictures go through it, so that the judges look at
            style and concept and not at whether a picture was decoded.
        folder: where the weights are kept between runs.
        epochs: passes of the concept classifier; the style classifier does a quarter.
        seed: seed of both.
    """
    concepts, styles = data.known, list(data.styles)
    about = {"concepts": concepts, "styles": styles, "epochs": epochs, "seed": seed, "test": data.test}
    path, facts = folder / "judges.safetensors", folder / "judges.json"
    concept, style = IconClassifier(len(concepts)), IconClassifier(len(styles))
    if path.exists() and facts.exists() and json.loads(facts.read_text()) == about:
        state = load_file(path)
        for name, model in (("concept", concept), ("style", style)):
            model.load_state_dict({k.removeprefix(name + "."): v for k, v in state.items() if k.startswith(name)})
            model.eval().requires_grad_(False)
        return Judges(concept, style, concepts, styles)
    known, test = set(concepts), set(data.test)
    parts = [(name, sorted(data.styles[name].concepts & known)) for name in styles]
    pictures = torch.cat([data.styles[name].pixels(members) for name, members in parts])
    both = torch.stack([pictures, through_autoencoder(vae, pictures, seed)])
    number = {concept: index for index, concept in enumerate(concepts)}
    rows = [(number[concept], styles.index(name), concept) for name, members in parts for concept in members]
    of_concept, of_style = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
    pretrained = torch.tensor([styles[row[1]] in PRETRAINING_SETS for row in rows])
    untested = torch.tensor([row[2] not in test for row in rows])
    concept = fit_classifier(
        both[:, pretrained], of_concept[pretrained], len(concepts), disturb_shapes, epochs=epochs, seed=seed
    )
    style = fit_classifier(
        both[:, untested], of_style[untested], len(styles), disturb_little, epochs=max(1, epochs // 4), seed=seed
    )
    folder.mkdir(parents=True, exist_ok=True)
    named = (("concept", concept), ("style", style))
    save_file({f"{name}.{k}": v.contiguous() for name, m in named for k, v in m.state_dict().items()}, path)
    facts.write_text(json.dumps(about))
    return Judges(concept, style, concepts, styles)
