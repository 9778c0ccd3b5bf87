"""Tuners on a live model: attaching, weights, residuals, text encoders and merging, in plain torch hooks."""
