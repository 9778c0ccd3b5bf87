"""`restune evaluate`: measure a tuner against its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, Field

from ..storage.base_files.check import check_base
from ..utils.weighted_path import split_weight
from .options.early_checks import check_data, check_device, check_tuners
from .options.interruption import stoppable
from .options.outputs import OverwriteOption

if TYPE_CHECKING:
    from ..evaluation import Evaluation


class EvaluateOptions(OverwriteOption):
    """Measure a tuner against its base on held-out images of its style.

    Example: restune evaluate --base ./stable-diffusion-v1-5 --tuner out/watercolor.safetensors
    --data ./held-out --training-images ./watercolors --output ./evaluation
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    base: str
    """Stable Diffusion 1.x, 2.x or XL: a folder in diffusers' format, one safetensors file, or a hub repository id."""
    vae: str | None = None
    """Autoencoder (VAE) instead of the base's own: a folder of an AutoencoderKL, a safetensors file, or a hub
    repository id."""
    tuner: str
    """Tuner file, optionally with its weight after a colon: `ink.safetensors:0.8`; the default weight is 1."""
    data: Path
    """Folder of captioned images of the style, in the format of a training folder, without training images."""
    output: Path
    """Folder for report.md, report.json and grid.png."""
    training_images: Path | None = None
    """Folder of the training images, to detect memorization."""
    drift_prompts: tuple[str, ...] = ()
    """Prompts that do not name the style, to measure unwanted changes."""
    steps: int = Field(default=20, gt=0)
    """Denoising steps."""
    guidance: float = Field(default=4.0, ge=0)
    """Classifier-free guidance scale."""
    seed: int = 0
    """Seed of the first image; image i uses seed + i."""
    limit: int | None = Field(default=None, ge=2)
    """Maximum number of images; the first ones are used."""
    batch_size: int = Field(default=16, gt=0)
    """Images per batch."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Compute device; `auto` uses a GPU if there is one."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Precision of the base; `auto` is fp16 on a GPU and fp32 on the CPU."""

    def run(self) -> None:
        """Run the evaluation, write the report and print its table."""
        outputs = [self.output / name for name in ("report.md", "report.json", "grid.png")]
        with stoppable(lambda: f"no report is written to {self.output}"):
            self.check_outputs(*outputs)
            self._check()
            print(self._evaluate().table())
        for path in outputs:
            print(path)

    def _check(self) -> None:
        check_base(self.base, self.vae)
        check_tuners([split_weight(self.tuner)[0]])
        check_data(self.data)
        if self.training_images is not None:
            check_data(self.training_images, "folder of training images")
        check_device(self.device)

    def _evaluate(self) -> Evaluation:
        from .quiet import quiet_libraries

        quiet_libraries()
        from ..evaluation import evaluate_tuner
        from .options.placement import load_placed

        pipeline = load_placed(self.base, self.device, self.dtype, self.vae)
        pipeline.set_progress_bar_config(disable=True)
        tuner, weight = split_weight(self.tuner)
        return evaluate_tuner(
            pipeline,
            tuner,
            self.data,
            self.output,
            weight=weight,
            training_images=self.training_images,
            drift_prompts=self.drift_prompts,
            steps=self.steps,
            guidance=self.guidance,
            seed=self.seed,
            limit=self.limit,
            batch_size=self.batch_size,
            vae=self.vae,
        )
