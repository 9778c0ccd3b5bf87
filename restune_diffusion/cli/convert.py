"""`restune convert`: convert tuner and LoRA files between formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import ConfigDict

from ..storage.base_files.location import local_base
from ..utils.errors import TunerFileError
from .options.interruption import stoppable
from .options.outputs import OverwriteOption


class ConvertOptions(OverwriteOption):
    """Convert a tuner or LoRA file to the format of another program.

    Input formats: files of this package, LoRAs of diffusers, PEFT, kohya's sd-scripts and ComfyUI, LoHa, LoKr and DoRA
    of LyCORIS and PEFT, and SC- and CSC-Tuners of ms-swift and SCEPTER. Output formats: this package's, LoRAs of
    diffusers and kohya, and skip tuners for ms-swift. Only tuners of lora can be written as LoRA.

    Example: restune convert ink_lora.safetensors ink.safetensors --to restune --base ./stable-diffusion-v1-5
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Annotated[Path, tyro.conf.Positional]
    """Input file, or a folder in the layout of ms-swift or diffusers."""
    output: Annotated[Path, tyro.conf.Positional]
    """Output file; a folder for ms-swift."""
    to: Literal["restune", "diffusers", "kohya", "swift"]
    """Output format; use `kohya` for ComfyUI and A1111."""
    base: str | None = None
    """Base checkpoint of the input file, required for files of other programs: a directory in diffusers' layout, or a
    hub repository id. Only its config is read, and for DoRA its weights."""
    partial: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Skip LoRA layers outside the linear layers of transformer blocks and text encoders, with a warning."""

    rank: int | None = None
    """Largest rank of a LoRA layer; higher ones are reduced by a singular value decomposition. LoHa, LoKr and DoRA are
    exact without it, at a high rank."""
    energy: float | None = None
    """Fraction of each LoRA layer's squared norm to keep, for instance 0.99; at the smallest rank."""

    def run(self) -> None:
        """Convert the file and print the output path."""
        from .quiet import quiet_libraries

        with stoppable(lambda: f"{self.output} is not written"):
            if not self.source.exists():
                raise TunerFileError(f"There is no file or folder {self.source}; give a tuner or LoRA file.")
            if self.base is not None:
                local_base(self.base, needs_index=False)
            self.check_outputs(self.output, inputs=[self.source])
            quiet_libraries()
            from ..conversion import convert

            kept = convert(
                self.source,
                self.output,
                self.to,
                base=self.base,
                partial=self.partial,
                rank=self.rank,
                energy=self.energy,
            )
        if self.rank is not None or self.energy is not None:
            print(f"The reduced ranks keep {kept:.2%} of the layers' squared norm.")
        print(self.output)
