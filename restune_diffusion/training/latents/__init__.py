"""Batches of noisy latents: cached encodings, sampling, noising and text conditioning."""
