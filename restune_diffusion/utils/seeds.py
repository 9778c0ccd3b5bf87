"""Derive independent seeds and generators from the seed of a run."""

from __future__ import annotations

import hashlib

import torch


def seeded(seed: int, purpose: str, number: int) -> torch.Generator:
    """Return a generator that depends on nothing but these."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, number))


def derived_seed(seed: int, purpose: str, number: int = 0) -> int:
    """Return a seed that depends on the run's, on what it is for, and on a number."""
    # A hash, because neighbouring seeds of the same purpose would overlap between runs: (seed 0, position 1)
    # and (seed 1, position 0).
    digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
