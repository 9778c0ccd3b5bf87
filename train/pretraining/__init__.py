"""How `restune-tiny` is pretrained: what the stages of `train/pretrain_base.py` are made of."""
