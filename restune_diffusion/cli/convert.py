"""`restune convert`: turn a file of one program into one of another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict


class ConvertOptions(BaseModel):
    """Read a tuner or LoRA of one program and write it for another.

    Read are files of this package, LoRAs of diffusers and of kohya's sd-scripts, and SC- and CSC-Tuners of ms-swift
    and SCEPTER. Written are the first three, and skip tuners for ms-swift.

    Example: restune convert ink_lora.safetensors ink.safetensors --to restune --base ./stable-diffusion-v1-5
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Annotated[Path, tyro.conf.Positional]
    """The file to read, or a folder as ms-swift and diffusers write them."""
    output: Annotated[Path, tyro.conf.Positional]
    """The file to write; for ms-swift a folder."""
    to: Literal["restune", "diffusers", "kohya", "swift"]
    """The program to write for; ComfyUI and A1111 read `kohya`."""
    base: str | None = None
    """The checkpoint that a file of another program is for: a directory in diffusers' layout, or the id of a hub
    repository; only its config is read."""
    partial: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave out what a LoRA changes beside the linear layers of the U-Net's transformer blocks, with a warning."""

    def run(self) -> None:
        """Convert and say where the result is."""
        from ..conversion import convert
        from .quiet import quiet_libraries

        quiet_libraries()
        convert(self.source, self.output, self.to, base=self.base, partial=self.partial)
        print(self.output)
