"""Tuners on a loaded model, with plain torch hooks: attaching, weights, residuals, text encoders, merging."""
