"""Benchmark of LoRA extracted from a fine-tuned checkpoint."""
