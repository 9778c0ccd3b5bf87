"""Modules that several stages share: networks, captions, icons, optimizers, the training loop and its log."""
