"""Limits of the HTTP API on one request and on all that are being read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of the HTTP API."""

    body_bytes: int = 32 * 2**20
    """Largest body of a request."""
    all_bodies_bytes: int = 256 * 2**20
    """Largest total size of the bodies that are being read or answered."""
    body_seconds: float = 60.0
    """Longest time in which a body must arrive."""
    image_pixels: int = 4096 * 4096
    """Most pixels of an uploaded image."""
    side: int = 2048
    """Longest side of a generated image, in pixels."""
    images: int = 16
    """Most images of one request."""
    steps: int = 200
    """Most denoising steps."""
    prompt_characters: int = 8000
    """Most characters of a prompt and of a negative prompt."""
    tuners: int = 8
    """Most tuners of one request."""
    weight: float = 10.0
    """Largest weight of a tuner, positive or negative."""
