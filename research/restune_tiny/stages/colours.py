"""Color classifier: style of an image by its palette, and evenness of its areas, independent of the content."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from research.restune_tiny.icon_sources import PRETRAINING_SETS
from research.restune_tiny.parts.folders import decoder_folder, write_tensors
from research.restune_tiny.parts.icons import load_icons, on_background
from research.restune_tiny.parts.layers import double_by_copies
from research.restune_tiny.parts.shares import colour_shares

SHADES = 9
RIDGE = 0.02
FLOOR = 2e-4
"""Added to each color's share before the square root: keeps the gradient of an absent color finite."""
SHARPNESS = 8.0
"""Factor from the outputs of the least-squares fit, about 0 to 1, to logits."""
NOISE = 0.3
"""Maximum noise on the latents of the decoded images, in standard deviations."""
STEP = 0.03
"""Color distance of two neighboring pixels, of 0..1, that counts as half an edge."""
COLOURS_FILE = "colours.safetensors"


def palette(images: Tensor) -> Tensor:
    """Return the square roots of the shares of 9^3 colors in images, N x 3 x H x W in [0, 1]; differentiable."""
    return (colour_shares(images, SHADES) + FLOOR).sqrt()


def unevenness(images: Tensor) -> Tensor:
    """Return the share of neighboring pixels that differ: N x 3 x H x W images in [0, 1] to N; differentiable.

    An edge of any strength counts as about one (the function of Geman and McClure 1987), so smoothing areas lowers
    the value and blurring edges does not.
    """
    across = (images[..., 1:] - images[..., :-1]).square().sum(1)
    down = (images[..., 1:, :] - images[..., :-1, :]).square().sum(1)
    return ((across / (across + STEP**2)).mean((1, 2)) + (down / (down + STEP**2)).mean((1, 2))) / 2


class ColourJudge(nn.Module):
    """Classifier of N x 3 x H x W images in [0, 1] to N x styles logits, linear in the palette.

    Attributes:
        uneven: mean unevenness of each style's images.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.spread: Tensor
        self.uneven: Tensor
        self.register_buffer("mean", torch.zeros(SHADES**3))
        self.register_buffer("spread", torch.ones(SHADES**3))
        self.register_buffer("uneven", torch.zeros(len(PRETRAINING_SETS)))
        self.head = nn.Linear(SHADES**3, len(PRETRAINING_SETS))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = SHARPNESS * self.head((palette(images) - self.mean) / self.spread)
        return logits


@torch.no_grad()
def fit_colour_judge(images: Tensor, styles: Tensor) -> ColourJudge:
    """Fit a judge to images, N x 3 x H x W in [0, 1], and N style numbers by ridge regression.

    The judge also stores the mean unevenness of each style's images.
    """
    judge = ColourJudge()
    found = torch.cat([palette(part) for part in images.split(256)])
    judge.mean.copy_(found.mean(0))
    judge.spread.copy_(found.std(0) + 1e-3)
    known = (found - judge.mean) / judge.spread
    rough = torch.cat([unevenness(part) for part in images.split(256)])
    for style in styles.unique().tolist():
        judge.uneven[style] = rough[styles == style].mean()
    wanted = F.one_hot(styles, len(PRETRAINING_SETS)).float()
    judge.head.bias.copy_(wanted.mean(0))
    square = known.T @ known + RIDGE * len(known) * torch.eye(known.shape[1])
    judge.head.weight.copy_(torch.linalg.solve(square, known.T @ (wanted - wanted.mean(0))).T)
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def train_colours(arguments: argparse.Namespace) -> None:
    """Fit the judge to the icons and their VAE reconstructions, and write it to the work folder."""
    icons, vae = load_icons(arguments.icons), AutoencoderKL.from_pretrained(decoder_folder(arguments.work))
    torch.manual_seed(arguments.seed)
    images, decoded = on_background(icons.pixels, torch.ones(len(icons.pixels), 3)), []
    for part in tqdm(images.split(32), desc="images through the VAE"):
        latents = vae.encode(part).latent_dist.mean
        level = NOISE / vae.config.scaling_factor * torch.rand(len(part), 1, 1, 1)
        decoded.append(vae.decode(latents + level * torch.randn(latents.shape)).sample)
    styles = torch.tensor([PRETRAINING_SETS.index(record["set"]) for record in icons.records])
    both = torch.cat([images, *decoded]) / 2 + 0.5
    judge = fit_colour_judge(both, styles.repeat(2))
    right = torch.cat([judge(part).argmax(1) for part in both.split(256)]) == styles.repeat(2)
    print(f"style accuracy on the training images: {float(right.float().mean()):.1%}")
    write_tensors(judge.state_dict(), arguments.work / COLOURS_FILE)


class Colours:
    """Color judge of samples, given as latents."""

    def __init__(self, work: Path) -> None:
        self.judge = ColourJudge()
        self.judge.load_state_dict(load_file(work / COLOURS_FILE))
        self.judge.eval().requires_grad_(False)
        self.vae = AutoencoderKL.from_pretrained(decoder_folder(work)).eval().requires_grad_(False)
        double_by_copies(self.vae)

    def images(self, drawn: Tensor) -> Tensor:
        """Return decoded images, about [0, 1], of scaled latents, N x 16 x 8 x 8."""
        decoded: Tensor = self.vae.decode(drawn / self.vae.config.scaling_factor).sample
        return decoded / 2 + 0.5

    def logits(self, images: Tensor) -> Tensor:
        """Return the style logits of images, N x styles."""
        # Fine noise prevents exact matches of single shades.
        level = 0.02 * torch.rand(len(images), 1, 1, 1)
        logits: Tensor = self.judge(images + level * torch.randn_like(images))
        return logits

    def excess(self, images: Tensor, styles: Tensor) -> Tensor:
        """Return the mean unevenness above that of the images' styles; more even images count as zero."""
        return (unevenness(images) - self.judge.uneven[styles]).clamp(min=0).mean()
