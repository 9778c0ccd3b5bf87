"""Pretraining of the bundled base: `prepare_icons.py` writes the data, `pretrain_base.py` runs the stages."""
