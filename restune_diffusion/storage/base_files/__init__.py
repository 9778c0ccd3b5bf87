"""Single-file checkpoints of a base: what a file is, and its model configs, both from its header alone."""
