"""Dtype of the computation in training."""

from __future__ import annotations

import torch

# torch 2.11 cannot tell.
FAST_BFLOAT16 = not hasattr(torch.cpu, "get_capabilities") or bool(torch.cpu.get_capabilities().get("avx512_bf16"))
"""A processor without these instructions imitates bfloat16: with AVX2 alone, a step takes 13 times as long."""

TRAINING_DTYPE = torch.bfloat16 if FAST_BFLOAT16 else torch.float32
