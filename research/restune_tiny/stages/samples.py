"""Stage that generates a sample grid with an exported pipeline."""

from __future__ import annotations

import argparse
import time

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

SAMPLE_CONCEPTS = ("red heart", "cat face", "alarm clock", "red apple", "house", "sun", "pizza", "dog face")
SAMPLE_STYLES = ("noto style", "twemoji style", "fluent flat style", "emojione style", "blob style")


def draw_samples(arguments: argparse.Namespace) -> None:
    """Generate a sample grid with the exported pipeline: a column per concept, a row per style."""
    pipeline = StableDiffusionPipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    concepts = arguments.concepts.split(",") if arguments.concepts else SAMPLE_CONCEPTS
    rows = arguments.styles.split(",") if arguments.styles else SAMPLE_STYLES
    sheet = Image.new("RGB", (66 * len(concepts) + 2, 66 * len(rows) + 2), "white")
    started = time.time()
    for row, style in enumerate(rows):
        generators = [torch.Generator().manual_seed(arguments.seed + column) for column in range(len(concepts))]
        prompts = [f"{concept}, {style}" if style else concept for concept in concepts]
        images = pipeline(
            prompts,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance,
            guidance_rescale=arguments.rescale,
            generator=generators,
        ).images
        for column, image in enumerate(images):
            sheet.paste(image, (66 * column + 2, 66 * row + 2))
    print(f"{(time.time() - started) / len(rows) / len(concepts):.2f} s per image")
    sheet.resize((sheet.width * arguments.zoom, sheet.height * arguments.zoom), Image.Resampling.NEAREST).save(
        arguments.out
    )
