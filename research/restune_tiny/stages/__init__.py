"""Stages of pretraining `restune-tiny`, one a module; `pretrain_base.py` runs each."""
