"""Train a control tuner, conditioned on images, on triples of image, condition image and caption.

On one device:       python train/train_control.py --base BASE --data IMAGES --output OUT --control.conditions canny
On several devices:  accelerate launch train/train_control.py --base BASE --data IMAGES --output OUT

Condition images come from the column "condition" of `metadata.jsonl`, or from a folder (--control-data) with the file
names of the training images. A condition named canny, palette, blur or mask can be computed from the training images.
"""

import sys

from restune_diffusion.cli.guard import run_guarded
from restune_diffusion.cli.train import parse_train_options

if __name__ == "__main__":
    sys.exit(run_guarded(lambda: parse_train_options(__doc__, defaults={"tuner": "control"}).run()))
