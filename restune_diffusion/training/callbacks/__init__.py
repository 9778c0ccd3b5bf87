"""Callbacks that watch a training run: progress, metrics, samples, drift, averaged weights."""
