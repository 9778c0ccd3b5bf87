"""Sweeps: train a tuner for each combination of settings on one set of encoded images."""
