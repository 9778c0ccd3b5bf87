"""Difference of a fine-tuned checkpoint and its base as a LoRA."""

from .extract import Extraction, extract_lora

__all__ = ["Extraction", "extract_lora"]
