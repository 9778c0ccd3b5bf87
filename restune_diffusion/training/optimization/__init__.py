"""Optimizers, their state in checkpoints, learning rates by part, and the averaged weights."""
