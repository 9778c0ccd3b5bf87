"""Train a tuner for one subject on a few images of it.

python train/train_dreambooth.py --base BASE --data IMAGES --output OUT --prompt "a sks dog" --class-prompt "a dog" \
    --preservation output

On several devices, use `accelerate launch` instead of `python`. `--preservation prior` is DreamBooth's method, with
class images that the base generates; `output` needs none. Flags of diffusers' script work too: --instance_prompt,
--instance_data_dir, --class_data_dir, --with_prior_preservation, --prior_loss_weight, --num_class_images and others.
For a placeholder token instead of `sks`: --tuner skip text --text.tokens "<dog>" --text.initializers dog
--prompt "a <dog>".
"""

import sys

from restune_diffusion.cli.guard import run_guarded
from restune_diffusion.cli.train import parse_train_options

if __name__ == "__main__":
    sys.exit(run_guarded(lambda: parse_train_options(__doc__).run()))
