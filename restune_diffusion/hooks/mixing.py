"""Convert the weights of attached tuners to factors per row, position and denoising step of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ..utils.devices import sent
from ..utils.errors import RestuneError
from .weights import TunerWeight, row_factor


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


class HostTimesteps:
    """Copy of a scheduler's timesteps in host memory, so that the host need not wait for each timestep.

    Args:
        scheduler: the scheduler of a pipeline; its timesteps are copied once after each `set_timesteps`.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._copied: torch.Tensor | None = None
        self._values = torch.empty(0)

    def read(self, timestep: torch.Tensor) -> torch.Tensor | None:
        """Return the value of a timestep in host memory, or None if it is not an element of the scheduler's list."""
        listed = self._scheduler.timesteps
        varies = any(step for size, step in zip(timestep.shape, timestep.stride(), strict=True) if size > 1)
        if varies or not isinstance(listed, torch.Tensor) or listed.dim() != 1:
            return None
        if timestep.untyped_storage().data_ptr() != listed.untyped_storage().data_ptr():
            return None
        if self._copied is not listed:
            self._copied, self._values = listed, listed.cpu()
        index, rest = divmod(int(timestep.storage_offset() - listed.storage_offset()), listed.stride(0))
        return self._values[index] if not rest and 0 <= index < len(listed) else None


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
    timesteps: HostTimesteps | None = field(default=None, repr=False)
    """Timesteps of the scheduler of the current call, if it is known."""

    @property
    def progress(self) -> torch.Tensor:
        """Progress of denoising, from 0 to 1: one number, or one per row; see `Schedule`."""
        return self._progress_of(self.timestep)

    def progress_on_host(self) -> list[float]:
        """Return the progress as numbers; it waits for the device only for a timestep of unknown origin."""
        timestep = self.timestep
        if isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu" and self.timesteps is not None:
            known = self.timesteps.read(timestep)
            timestep = timestep if known is None else known
        progress: list[float] = self._progress_of(timestep).flatten().tolist()
        return progress

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

    def guided(self, images: int) -> bool:
        """Return whether the first copy of the images is the unconditional branch of classifier-free guidance."""
        return self.layout.guided if self.layout is not None else self.rows > images

    def _progress_of(self, timestep: torch.Tensor | float) -> torch.Tensor:
        step = timestep if isinstance(timestep, torch.Tensor) else torch.tensor(timestep)
        return (1 - (step.float() + 1) / self.num_train_timesteps).clamp(0, 1)


class ActiveRows:
    """Rows of a batch on which a tuner acts, and their factors, as tensors on a device.

    Args:
        factors: factor of each row.
        device: device of the base.
    """

    def __init__(self, factors: tuple[float, ...], device: torch.device) -> None:
        numbers = [row for row, factor in enumerate(factors) if factor]
        self.numbers = sent(torch.tensor(numbers), device)
        self._factors = sent(torch.tensor([factors[row] for row in numbers]), device)
        self._at: dict[tuple[float, int], torch.Tensor] = {}

    def factors(self, site_factor: float, dims: int) -> torch.Tensor:
        """Return the factors at a site, for broadcasting over a residual with `dims` dimensions."""
        key = site_factor, dims
        if key not in self._at:
            # Kept, so that autograd may have to save it in another pass.
            with torch.inference_mode(False):
                self._at[key] = (self._factors * site_factor).view(-1, *[1] * (dims - 1))
        return self._at[key]


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
            guided = this.guided(images)
            # The first copy of the images is the unconditional branch.
            copies = [(weight.on == "uncond") == (guided and copy == 0) for copy in range(this.rows // images)]
            halves = [float(acts) for acts in copies for _ in range(images)]
    if weight.steps is not None:
        steps = [weight.steps.at(progress) for progress in this.progress_on_host()]
    count = this.rows if max(len(values), len(halves), len(steps)) > 1 else 1
    factors = [
        row_factor(values[row % len(values)], halves[row % len(halves)], steps[row % len(steps)])
        for row in range(count)
    ]
    if len(set(factors)) == 1:
        return (factors[0],)
    return tuple(factor for factor in factors for _ in range(this.frames))


def mask_at(
    weight: TunerWeight, mask: torch.Tensor, stride: int, x: torch.Tensor, this: ForwardContext
) -> torch.Tensor:
    """Return a tuner's mask, resized to a site and broadcastable to its feature `x`.

    Args:
        weight: the tuner's weight.
        mask: its mask in fp32, on the device of `x`.
        stride: stride of the site.
        x: feature `(rows, channels, height, width)` or `(rows, tokens, channels)`.
        this: context of the forward pass.

    Raises:
        RestuneError: if the tokens of `x` do not form the grid of the site.
    """
    if x.dim() == 4:
        size = (x.shape[-2], x.shape[-1])
    else:
        size = (-(-this.size[0] // stride), -(-this.size[1] // stride))
        if x.dim() == 2 or size[0] * size[1] != x.shape[1]:
            found = "no positions" if x.dim() == 2 else f"{x.shape[1]} tokens"
            raise RestuneError(
                f"A mask needs a feature with a {size[0]}x{size[1]} grid of tokens, but this site has {found}; "
                "remove the mask from this tuner's weight."
            )
    mask = F.interpolate(mask.reshape(-1, 1, *mask.shape[-2:]), size=size, mode="area")
    if len(mask) > 1:
        mask = mask.repeat(this.rows // this.images(weight), 1, 1, 1).repeat_interleave(this.frames, 0)
    return mask if x.dim() == 4 else mask.flatten(2).transpose(1, 2)
