"""Limits of an engine, given or computed from a memory budget."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import RequestRefused


@dataclass(frozen=True)
class Limits:
    """Limits of an engine.

    Args:
        max_rows: largest number of rows of a U-Net call; an image with guidance takes two.
        max_queue: largest number of waiting requests.
        max_side: largest width or height in pixels; None sets no limit.
        max_pixels: largest number of pixels of an image; None sets no limit.
        max_steps: largest number of steps of a request.
        max_attached: largest number of attached tuners.
        memory_bytes: memory for the activations of a U-Net call and of a decoding, beyond the models; it reduces
            the rows of a call for large images. None sets no limit.
    """

    max_rows: int = 8
    max_queue: int = 64
    max_side: int | None = None
    max_pixels: int | None = None
    max_steps: int = 150
    max_attached: int = 16
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_queue", "max_side", "max_pixels", "max_steps", "max_attached", "memory_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestRefused(f"The limit `{name}` must be positive, but is {value}.")
