"""Parse the command line and run the chosen command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, TypeAlias

import tyro

from ..training.config import TrainConfig
from .convert import ConvertOptions
from .data import DataOptions
from .demo import DemoOptions
from .evaluate import EvaluateOptions
from .generate import GenerateOptions
from .grid import GridOptions
from .guard import run_guarded
from .inspect import InspectOptions
from .merge import MergeOptions

# tyro shows pydantic's message when a value is refused; the link to pydantic's manual helps nobody here.
os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")

_TRAIN_HELP = """Train a tuner on a folder of images.

Example: restune train --base ./stable-diffusion-v1-5 --data ./watercolors --output ./out
--steps 2000 --mixed-precision fp16 --validation.prompts "a fox" "a lighthouse"
"""

Command: TypeAlias = (
    Annotated[TrainConfig, tyro.conf.subcommand("train", description=_TRAIN_HELP)]
    | Annotated[GenerateOptions, tyro.conf.subcommand("generate")]
    | Annotated[GridOptions, tyro.conf.subcommand("grid")]
    | Annotated[EvaluateOptions, tyro.conf.subcommand("evaluate")]
    | Annotated[DataOptions, tyro.conf.subcommand("data")]
    | Annotated[InspectOptions, tyro.conf.subcommand("inspect")]
    | Annotated[ConvertOptions, tyro.conf.subcommand("convert")]
    | Annotated[MergeOptions, tyro.conf.subcommand("merge")]
    | Annotated[DemoOptions, tyro.conf.subcommand("demo")]
)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        args: the arguments; those of the process by default.
    """
    command = tyro.cli(
        Command,
        prog="restune",
        description="Customize Stable Diffusion with detachable tuners.",
        args=args,
    )
    sys.exit(run_guarded(lambda: run(command)))


def run(command: Command) -> None:
    """Run one command."""
    # The commands import torch and diffusers, which `--help` must not wait for.
    if isinstance(command, TrainConfig):
        from .train import run_train

        run_train(command)
    else:
        command.run()
