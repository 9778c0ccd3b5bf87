"""Train a control tuner, which images steer, on triples of image, condition image and caption.

On one device:       python train/train_control.py --base BASE --data IMAGES --output OUT --control.conditions canny
On several devices:  accelerate launch train/train_control.py --base BASE --data IMAGES --output OUT

Condition images are named in `metadata.jsonl` under "condition", or lie in a folder (--control-data) under the names
of the training images, or are made from these where the condition is called canny, palette, blur or mask.
"""

import sys

import tyro

from restune_diffusion.cli.guard import run_guarded
from restune_diffusion.training import TrainConfig, sweep, train

if __name__ == "__main__":
    config = tyro.cli(TrainConfig, description=__doc__, args=["--tuner", "control", *sys.argv[1:]])
    sys.exit(run_guarded(lambda: (train if config.sweep is None else sweep)(config, stop_on_signal=True)))
