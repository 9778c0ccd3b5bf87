"""Variants of an image's caption: several captions, shuffled and dropped tags, wildcards."""
