"""How to draw with a run's tuner: what a reader can copy."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..config.train_config import TrainConfig
from ..losses.objective import scheduler_changes


def example_prompt(config: TrainConfig, captions: list[str]) -> str:
    """Return a prompt that fits the tuner: of the validation, else a caption that was trained."""
    choices = [*config.validation.prompts, config.data.prompt, *captions, "a picture"]
    return next(choice for choice in choices if choice)


def python_example(config: TrainConfig, tuner: Path, prompt: str) -> str:
    """Return Python that draws the prompt."""
    changes = scheduler_changes(config.loss.prediction_type, config.loss.rescale_betas_zero_snr)
    conditions = config.conditioned.conditions if config.conditioned else ()
    control_images = ", ".join(f"{name!r}: Image.open({f'{name}.png'!r})" for name in conditions)
    lines = [
        f"from diffusers import {'DDIMScheduler, ' if changes else ''}DiffusionPipeline",
        *(["from PIL import Image"] if conditions else []),
        "from restune_diffusion import enable_restune",
        "",
        f"pipe = enable_restune(DiffusionPipeline.from_pretrained({config.base!r}))",
    ]
    if changes:
        settings = ", ".join(f"{name}={value!r}" for name, value in changes.items())
        lines.append(f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, {settings})")
    lines += [
        f"pipe.load_tuner_weights({str(tuner)!r}, tuner_name={config.name!r})",
        f"pipe.set_tuners({config.name!r}, 1.0)  # how strongly it acts; 0 is the base alone",
        f"image = pipe({prompt!r}{f', tuner_image={{{control_images}}}' if conditions else ''}).images[0]",
        'image.save("image.png")',
    ]
    return "\n".join(lines)


def command_example(config: TrainConfig, tuner: Path, prompt: str) -> str | None:
    """Return the command that draws the prompt; None where a scheduler is needed that it cannot be told."""
    if scheduler_changes(config.loss.prediction_type, config.loss.rescale_betas_zero_snr):
        return None
    words = ["restune", "generate", "--base", config.base, "--tuner", str(tuner), "--prompt", prompt]
    if config.conditioned:
        words += ["--control-image", *(f"{name}={name}.png" for name in config.conditioned.conditions)]
    return shlex.join(words)
