"""Callbacks of a training run: progress, metrics, samples, drift, averaged weights."""
