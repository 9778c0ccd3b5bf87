"""Distillation: train a tuner on the predictions of another tuner, with or without images."""
