"""Pretraining stages of `restune-tiny`, one per module; `pretrain_base.py` runs each."""
