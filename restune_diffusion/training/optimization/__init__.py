"""Optimizers, their state in checkpoints, learning rates by part, and weight averaging."""
