"""Checks of a request against the base, the library and the limits, before it is accepted."""

from __future__ import annotations

import math
import random
from typing import Any

from PIL import Image

from ...pipelines.call_options import image_size
from ...utils.errors import ConditionError, RestuneError, TunerNameError
from ..errors import RequestRefused
from ..library import TunerLibrary
from ..limits import Limits
from ..requests import ImageRequest
from ..tickets import Ticket
from .job import Job, Size
from .memory import decoding_bytes, row_bytes
from .views import PipelineViews

_MIB = 1 << 20
_RANDOM_SEEDS = 1 << 32


class Admittance:
    """Checks of requests; safe to use from any thread.

    Args:
        pipeline: the pipeline of the base.
        library: the tuners.
        limits: the limits.
    """

    def __init__(self, pipeline: Any, library: TunerLibrary | None, limits: Limits) -> None:
        self.views = PipelineViews(pipeline)
        self._pipeline = pipeline
        self._library = library
        self._limits = limits
        self._scale = int(pipeline.vae_scale_factor)

    def job(self, request: ImageRequest) -> Job:
        """Return the job of a request.

        Raises:
            RequestRefused: if the request does not fit the base or the limits.
            TunerNameError: if a tuner is not in the library.
            TunerFileError: if the file of a tuner is broken.
            ConditionError: if a control tuner has no condition image.
        """
        task = self.views.task(request)
        width, height = self._image_size(request)
        rows = 2 if request.guided and self._pipeline.unet.config.time_cond_proj_dim is None else 1
        size = height // self._scale, width // self._scale
        self._check_limits(request, width, height, size, rows)
        self._check_tuners(request)
        scheduler = self.views.scheduler(request.scheduler, request.steps)
        seed = random.randrange(_RANDOM_SEEDS) if request.seed is None else request.seed
        steps = request.steps if request.image is None else int(request.steps * request.strength)
        return Job(Ticket(request, seed, steps), task, scheduler, width, height, size, rows)

    def rows_of(self, size: Size) -> int:
        """Return the largest number of rows of a call with latents of a size; 0 if not even one row fits."""
        limits = self._limits
        if limits.memory_bytes is None:
            return limits.max_rows
        # A decoding runs between two U-Net calls and not beside one, but its memory stays with the allocator.
        left = limits.memory_bytes - decoding_bytes(self._pipeline.vae, size, self._scale)
        return max(0, min(limits.max_rows, left // row_bytes(self._pipeline.unet, size)))

    def _image_size(self, request: ImageRequest) -> tuple[int, int]:
        width, height = request.width, request.height
        if isinstance(request.image, Image.Image):
            factor = math.lcm(8, self._scale)
            width, height = (
                asked or max(factor, side // factor * factor)
                for asked, side in zip((width, height), request.image.size, strict=True)
            )
        try:
            return image_size(self._pipeline, width, height)
        except RestuneError as error:
            raise RequestRefused(str(error)) from error

    def _check_limits(self, request: ImageRequest, width: int, height: int, size: Size, rows: int) -> None:
        limits = self._limits
        if limits.max_side is not None and max(width, height) > limits.max_side:
            raise RequestRefused(f"{width}x{height} is too large; a side has {limits.max_side} pixels at most.")
        if limits.max_pixels is not None and width * height > limits.max_pixels:
            raise RequestRefused(f"{width}x{height} is too large; an image has {limits.max_pixels} pixels at most.")
        if request.steps > limits.max_steps:
            raise RequestRefused(f"{request.steps} steps are too many; use {limits.max_steps} at most.")
        if rows > limits.max_rows:
            raise RequestRefused(f"An image with guidance takes {rows} rows, but the limit is {limits.max_rows}.")
        if rows > self.rows_of(size):
            assert limits.memory_bytes is not None
            needed = rows * row_bytes(self._pipeline.unet, size) + decoding_bytes(
                self._pipeline.vae, size, self._scale
            )
            raise RequestRefused(
                f"An image of {width}x{height} needs about {math.ceil(needed / _MIB)} MiB of memory, but the limit is "
                f"{limits.memory_bytes // _MIB} MiB; use a smaller size."
            )

    def _check_tuners(self, request: ImageRequest) -> None:
        if request.tuners and self._library is None:
            raise TunerNameError("This engine serves the base alone, because it has no tuner library.")
        if len(request.active_tuners) > self._limits.max_attached:
            raise RequestRefused(
                f"{len(request.tuners)} tuners are too many; use {self._limits.max_attached} at most."
            )
        takes_conditions = False
        for name, weight in request.tuners:
            assert self._library is not None
            entry = self._library.usable(name) if weight else self._library.entry(name)
            takes_conditions |= "control" in entry.families
            if weight and entry.conditions and request.conditions is None:
                raise ConditionError(
                    f"The tuner {name!r} needs an image for {' or '.join(map(repr, entry.conditions))}; give one as a "
                    "condition, or give the tuner no weight."
                )
        if request.conditions is not None and not takes_conditions:
            raise ConditionError("No tuner of the request takes a condition image; name a control tuner, or omit it.")
