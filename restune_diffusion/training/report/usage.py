"""Examples of generating images with a run's tuner, to copy from the report."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..config.train_config import TrainConfig
from ..losses.objective import scheduler_changes


def example_prompt(config: TrainConfig, captions: list[str]) -> str:
    """Return a prompt for the tuner: a validation prompt, otherwise a training caption."""
    choices = [*config.validation.prompts, config.data.prompt, *captions, "an image"]
    return next(choice for choice in choices if choice)


def python_example(config: TrainConfig, tuner: Path, prompt: str) -> str:
    """Return Python code that generates an image of the prompt."""
    changes = scheduler_changes(config.loss.prediction_type, config.loss.rescale_betas_zero_snr)
    conditions = config.conditioned.conditions if config.conditioned else ()
    control_images = ", ".join(f"{name!r}: Image.open({f'{name}.png'!r})" for name in conditions)
    imports = ["DDIMScheduler"] if changes else []
    # diffusers reads a VAE in one file only with a config, and a pipeline in one file only by another method.
    of_package = config.vae is not None or Path(config.base).is_file()
    if of_package:
        vae = "" if config.vae is None else f", {config.vae!r}"
        loading = f"pipe = load_base({config.base!r}, torch.float32{vae})"
    else:
        imports.append("DiffusionPipeline")
        loading = f"pipe = enable_restune(DiffusionPipeline.from_pretrained({config.base!r}))"
    lines = [
        *(["import torch"] if of_package else []),
        *([f"from diffusers import {', '.join(imports)}"] if imports else []),
        *(["from PIL import Image"] if conditions else []),
        "from restune_diffusion.pipelines.load_base import load_base"
        if of_package
        else "from restune_diffusion import enable_restune",
        "",
        loading,
    ]
    if changes:
        settings = ", ".join(f"{name}={value!r}" for name, value in changes.items())
        lines.append(f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, {settings})")
    lines += [
        f"pipe.load_tuner_weights({str(tuner)!r}, tuner_name={config.name!r})",
        f"pipe.set_tuners({config.name!r}, 1.0)  # weight of the tuner; 0 disables it",
        f"image = pipe({prompt!r}{f', tuner_image={{{control_images}}}' if conditions else ''}).images[0]",
        'image.save("image.png")',
    ]
    return "\n".join(lines)


def command_example(config: TrainConfig, tuner: Path, prompt: str) -> str | None:
    """Return the command that generates an image of the prompt, or None if the tuner needs a changed scheduler."""
    if scheduler_changes(config.loss.prediction_type, config.loss.rescale_betas_zero_snr):
        return None
    vae = [] if config.vae is None else ["--vae", config.vae]
    arguments = ["restune", "generate", "--base", config.base, *vae, "--tuner", str(tuner), "--prompt", prompt]
    if config.conditioned:
        arguments += ["--control-image", *(f"{name}={name}.png" for name in config.conditioned.conditions)]
    return shlex.join(arguments)
