"""Derive independent seeds and generators from the seed of a run."""

from __future__ import annotations

import hashlib

import torch


def seeded(seed: int, purpose: str, number: int) -> torch.Generator:
    """Return a CPU generator that depends only on the run's seed, a purpose and a number."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, number))


def derived_seed(seed: int, purpose: str, number: int = 0) -> int:
    """Return a 63-bit seed derived from the run's seed, a purpose and a number."""
    # A sum would make adjacent seeds overlap between runs: (seed 0, position 1) and (seed 1, position 0).
    digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
