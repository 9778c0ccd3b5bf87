"""Measurements on held-out images, and what a run does with them: keep the best tuner, stop early."""
