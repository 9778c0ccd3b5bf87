"""Train a style tuner on a folder of images with captions.

On one device:       python train/train_style.py --base BASE --data IMAGES --output OUT
On several devices:  accelerate launch train/train_style.py --base BASE --data IMAGES --output OUT
"""

import sys

from restune_diffusion.cli.guard import run_guarded
from restune_diffusion.cli.train import parse_train_options

if __name__ == "__main__":
    sys.exit(run_guarded(lambda: parse_train_options(__doc__).run()))
