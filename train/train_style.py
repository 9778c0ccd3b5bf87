"""Train a style tuner on a folder of images with captions.

On one device:       python train/train_style.py --base BASE --data IMAGES --output OUT
On several devices:  accelerate launch train/train_style.py --base BASE --data IMAGES --output OUT
"""

import sys

import tyro

from restune_diffusion.cli.guard import run_guarded
from restune_diffusion.training import TrainConfig, sweep, train

if __name__ == "__main__":
    config = tyro.cli(TrainConfig, description=__doc__)
    sys.exit(run_guarded(lambda: (train if config.sweep is None else sweep)(config, stop_on_signal=True)))
