"""Train on a large set of images, each with a caption of its own.

python train/train_text_to_image.py --base BASE --data IMAGES --output OUT --caption-dropout 0.1 --ema-decay 0.999

On several devices, use `accelerate launch` instead of `python`. Such a set has no common --prompt: captions come from
`metadata.jsonl` or a `.txt` beside each image. An image without one is left out and listed. Flags of diffusers' script
work too: --train_data_dir, --max_train_steps, --output_dir and others.
"""

import sys

from restune_diffusion.cli.guard import run_guarded
from restune_diffusion.cli.train import parse_train_options

if __name__ == "__main__":
    sys.exit(run_guarded(lambda: parse_train_options(__doc__).run()))
