"""The icon-style benchmark: train tuners on an unseen style and compare samples with the style's true images."""
