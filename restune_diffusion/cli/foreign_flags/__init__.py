"""Flags of the training scripts of diffusers and kohya: translated, refused or ignored with a notice."""
