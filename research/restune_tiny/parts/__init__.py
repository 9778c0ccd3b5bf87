"""Modules shared by several stages: networks, captions, icons, optimizers, the training loop and its log."""
