"""`restune convert`: convert tuner and LoRA files between formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import ConfigDict

from ..storage.base_files.contents import holds_unet
from ..storage.base_files.location import local_base
from ..utils.errors import TunerFileError, UsageError
from .options.interruption import stoppable
from .options.outputs import OverwriteOption


class ConvertOptions(OverwriteOption):
    """Convert a tuner or LoRA file to the format of another program, or extract a LoRA from a fine-tuned checkpoint.

    Input formats: files of this package, LoRAs of diffusers, PEFT, kohya's sd-scripts and ComfyUI, LoHa, LoKr and DoRA
    of LyCORIS and PEFT, and SC- and CSC-Tuners of ms-swift and SCEPTER. Output formats: this package's, LoRAs of
    diffusers and kohya, and skip tuners for ms-swift. Only tuners of lora can be written as LoRA.

    The difference of a checkpoint and its --base becomes a LoRA, at a rank within --rank and --energy.

    Example: restune convert ink_lora.safetensors ink.safetensors --to restune --base ./stable-diffusion-v1-5

    Example: restune convert ./fine-tuned ink.safetensors --to restune --base ./stable-diffusion-v1-5 --rank 64
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Annotated[Path, tyro.conf.Positional]
    """Input file, or a folder in the layout of ms-swift or diffusers; or a fine-tuned checkpoint."""
    output: Annotated[Path, tyro.conf.Positional]
    """Output file; a folder for ms-swift."""
    to: Literal["restune", "diffusers", "kohya", "swift"]
    """Output format; use `kohya` for ComfyUI and A1111."""
    base: str | None = None
    """Base checkpoint of the input file, required for files of other programs: a directory in diffusers' layout, or a
    hub repository id. Only its config is read, and for DoRA and checkpoints its weights."""
    partial: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Skip LoRA layers outside the linear layers of transformer blocks and text encoders, with a warning."""

    rank: int | None = None
    """Largest rank of a LoRA layer; higher ones are reduced by a singular value decomposition. LoHa, LoKr and DoRA are
    exact without it, at a high rank."""
    energy: float | None = None
    """Fraction of each LoRA layer's squared norm to keep, for instance 0.99; at the smallest rank."""
    report: Path | None = None
    """JSON file to write what is kept of each layer of a checkpoint, and what is left out."""

    def run(self) -> None:
        """Convert the file and print the output path."""
        from .quiet import quiet_libraries

        with stoppable(lambda: f"{self.output} is not written"):
            if not self.source.exists():
                raise TunerFileError(f"There is no file or folder {self.source}; give a tuner or LoRA file.")
            if self.base is not None:
                local_base(self.base, needs_index=False)
            checkpoint = holds_unet(self.source)
            if self.report is not None and not checkpoint:
                raise UsageError(f"--report describes an extraction from a checkpoint, but {self.source} is a file.")
            self.check_outputs(*([self.report] if self.report else []), self.output, inputs=[self.source])
            quiet_libraries()
            if checkpoint:
                self._extract()
                return
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

    def _extract(self) -> None:
        if self.base is None:
            raise UsageError(f"{self.source} is a checkpoint; give the one that it was trained from with --base.")
        from tqdm import tqdm

        from ..conversion.convert import write_any
        from ..conversion.extraction import extract_lora
        from ..conversion.products.reduction import Reduction
        from ..utils.atomic_write import atomic_write

        with tqdm(desc="Extracting", unit="tensor", disable=None) as bar:

            def advance(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            extraction = extract_lora(str(self.source), self.base, Reduction(self.rank, self.energy), advance=advance)
        write_any(extraction.tuner, self.output, self.to)
        print(extraction.report.describe())
        if self.report is not None:
            with atomic_write(self.report) as file:
                file.write(json.dumps(extraction.report.as_json(), indent=1).encode())
            print(self.report)
        print(self.output)
