"""How the bundled base was made: `prepare_icons.py` makes the data, `pretrain_base.py` runs the stages."""
