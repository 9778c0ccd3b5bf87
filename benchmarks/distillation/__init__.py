"""Benchmark of distillation: a LoRA as the teacher of a bypass and of a skip tuner."""
