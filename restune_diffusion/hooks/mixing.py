"""Convert the weights of attached tuners to factors per row, position and denoising step of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..backbones import Site
from ..utils.errors import RestuneError
from .weights import Schedule, TunerWeight, Value, piece_factor, piece_holds, row_factor

# Capacity of the tensors that a compiled graph reads; exceeding it recompiles once.
_IMAGES = 64
_PIECES = 16
_ALWAYS = Schedule(((0.0, 1.0, 1.0, 1.0),))
# Larger than any progress, so that the segment never applies.
_UNUSED = 2.0


@dataclass(frozen=True)
class Layout:
    """Layout of the rows of a batch: one copy of the images per branch of classifier-free guidance.

    Args:
        images: number of images; rows are `[image 0, image 1, ...]`, once per copy.
        guided: whether the first copy is the unconditional branch of classifier-free guidance.
        prompts: number of prompts; the images of one prompt are adjacent.
    """

    images: int
    guided: bool
    prompts: int = 1


@dataclass
class ForwardContext:
    """Batch, timestep and layout of one forward pass of the base."""

    rows: int
    """Batch size."""
    size: tuple[int, int]
    """Height and width of the latent."""
    device: torch.device
    timestep: torch.Tensor | float
    """Timestep: one number, or one per row."""
    num_train_timesteps: int
    layout: Layout | None
    frames: int = 1
    """Number of adjacent rows at the sites for each row of the batch: the frames of a video."""

    @property
    def progress(self) -> torch.Tensor:
        """Progress of denoising, from 0 to 1: one number, or one per row; see `Schedule`."""
        step = self.timestep if isinstance(self.timestep, torch.Tensor) else torch.tensor(self.timestep)
        return (1 - (step.float() + 1) / self.num_train_timesteps).clamp(0, 1)

    def images(self, weight: TunerWeight) -> int:
        """Return the number of images in the batch.

        Raises:
            RestuneError: if it is unknown, or the batch size is not a multiple of it.
        """
        images = self.layout.images if self.layout is not None else _images_of(weight)
        if images is None:
            raise RestuneError(
                "The rows of the conditional guidance branch are unknown; generate with a pipeline, or set "
                "TunerManager.layout."
            )
        if self.rows % images or weight.count not in (1, images):
            raise RestuneError(
                f"The tuners' weights are for {_images_of(weight) or images} images, but the batch has {self.rows} "
                "rows; give one weight per image."
            )
        return images


def check_images(weight: TunerWeight, images: int) -> None:
    """Raise `RestuneError` if a weight is for another number of images than the call generates."""
    count = _images_of(weight)
    if count not in (None, images):
        raise RestuneError(
            f"The tuners' weights are for {count} images, but {images} are generated; give one weight per image."
        )


def _images_of(weight: TunerWeight) -> int | None:
    """Return the number of images of a weight with values or masks per image, or None."""
    counts = {weight.count} | ({len(weight.mask)} if weight.mask is not None and weight.mask.dim() == 3 else set())
    counts.discard(1)
    if len(counts) > 1:
        raise RestuneError(f"A weight has values and masks for different numbers of images, {sorted(counts)}.")
    return counts.pop() if counts else None


def row_factors(weight: TunerWeight, this: ForwardContext) -> tuple[float, ...]:
    """Return the factor of every row at the sites, or a single factor if all rows have the same.

    Raises:
        RestuneError: if the weight is for another number of images than the batch.
    """
    # Each list has one number for all rows, or one per row or image.
    values, halves, steps = weight.values, [1.0], [1.0]
    if len(values) > 1 or weight.on != "both":
        images = this.images(weight)
        if weight.on != "both":
            halves = [half for half in _halves(weight.on, this, images) for _ in range(images)]
    if weight.steps is not None:
        steps = [weight.steps.at(progress) for progress in this.progress.flatten().tolist()]
    count = this.rows if max(len(values), len(halves), len(steps)) > 1 else 1
    factors = [
        row_factor(values[row % len(values)], halves[row % len(halves)], steps[row % len(steps)])
        for row in range(count)
    ]
    if len(set(factors)) == 1:
        return (factors[0],)
    return tuple(factor for factor in factors for _ in range(this.frames))


def _halves(on: str, this: ForwardContext, images: int) -> list[float]:
    """Return 1 for each copy of the images in the guidance branch that a tuner acts on, 0 for the others."""
    guided = this.layout.guided if this.layout is not None else this.rows > images
    return [float((on == "uncond") == (guided and copy == 0)) for copy in range(this.rows // images)]


def mask_at(weight: TunerWeight, site: Site, x: torch.Tensor, this: ForwardContext) -> torch.Tensor | None:
    """Return a tuner's mask, resized to a site and broadcastable to its feature `x`; None if there is no mask.

    Args:
        weight: the tuner's weight.
        site: the site of `x`.
        x: feature `(rows, channels, height, width)` or `(rows, tokens, channels)`.
        this: context of the forward pass.

    Raises:
        RestuneError: if the tokens of `x` do not form the grid of the site.
    """
    if weight.mask is None:
        return None
    if x.dim() == 4:
        size = (x.shape[-2], x.shape[-1])
    else:
        size = (-(-this.size[0] // site.stride), -(-this.size[1] // site.stride))
        if x.dim() == 2 or size[0] * size[1] != x.shape[1]:
            found = "no positions" if x.dim() == 2 else f"{x.shape[1]} tokens"
            raise RestuneError(
                f"A mask needs a feature with a {size[0]}x{size[1]} grid of tokens, but this site has {found}; "
                "remove the mask from this tuner's weight."
            )
    mask = weight.mask.to(x.device, torch.float32)
    mask = F.interpolate(mask.reshape(-1, 1, *mask.shape[-2:]), size=size, mode="area")
    if len(mask) > 1:
        mask = mask.repeat(this.rows // this.images(weight), 1, 1, 1).repeat_interleave(this.frames, 0)
    return mask if x.dim() == 4 else mask.flatten(2).transpose(1, 2)


class WeightBuffers:
    """Tensors from which a compiled graph reads a tuner's weight; they are updated in place.

    Args:
        sites: the sites that the tuner writes to.
        device: device of the tuner.
    """

    def __init__(self, sites: Sequence[str], device: torch.device) -> None:
        self.place = {site: index for index, site in enumerate(sites)}
        self.values = torch.zeros(_IMAGES, device=device)
        self.count = torch.ones((), dtype=torch.long, device=device)
        self.sites = torch.ones(len(sites), device=device)
        self.curve = torch.full((_PIECES, 6), _UNUSED, device=device)

    def set(self, weight: TunerWeight, factors: dict[str, float]) -> None:
        """Write a weight and its factors by site to the tensors."""
        values = torch.tensor(weight.values)
        if len(values) > len(self.values):
            self.values = torch.zeros(len(values), device=self.values.device)
        self.values[: len(values)] = values.to(self.values.device)
        self.count.fill_(len(values))
        self.sites.copy_(torch.tensor([factors[site] for site in self.place]))
        # Without a schedule the factor is one throughout, so that setting a schedule later reuses the same graph.
        pieces = (weight.steps or _ALWAYS).disjoint()
        if len(pieces) > len(self.curve):
            self.curve = torch.full((len(pieces), 6), _UNUSED, device=self.curve.device)
        self.curve.fill_(_UNUSED)
        if pieces:
            self.curve[: len(pieces)] = torch.tensor(pieces, device=self.curve.device)

    def to(self, device: torch.device) -> None:
        """Move the tensors to a device."""
        self.values, self.count = self.values.to(device), self.count.to(device)
        self.sites, self.curve = self.sites.to(device), self.curve.to(device)

    def factors(self, site: str, weight: TunerWeight, this: ForwardContext) -> torch.Tensor:
        """Return the factor of every row at a site, `(rows * frames,)`, without reading a tensor's value.

        It does not check that the batch size is a multiple of the number of values, which the graph cannot read.
        """
        rows = torch.arange(this.rows, device=self.values.device)
        value, step = self.values[rows % self.count], self._step(this.progress.to(rows.device))
        half: Value = 1.0
        if weight.on != "both":
            images = this.images(weight)
            half = torch.tensor(_halves(weight.on, this, images), device=rows.device).repeat_interleave(images)
        factors: torch.Tensor = row_factor(value, half, step) * self.sites[self.place[site]]
        return factors if this.frames == 1 else factors.repeat_interleave(this.frames)

    def _step(self, progress: torch.Tensor) -> torch.Tensor:
        """Evaluate `Schedule.at` for a tensor of progresses."""
        begin, end, start, length, first, last = self.curve.unbind(1)
        progress = progress[..., None]
        factors = piece_factor(progress, start, length, first, last)
        return torch.where(piece_holds(progress, begin, end), factors, 0).sum(-1)
