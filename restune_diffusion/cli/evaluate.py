"""`restune evaluate`: measure a tuner against its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import ConfigDict, Field

from ..storage.base_files.check import check_base
from ..utils.errors import RestuneError, UsageError
from .options.early_checks import check_data, check_device, check_tuners
from .options.interruption import stoppable
from .options.mix import split_weight
from .options.outputs import OverwriteOption

if TYPE_CHECKING:
    from ..evaluation import Evaluation


class EvaluateOptions(OverwriteOption):
    """Measure a tuner against its base on held-out images of its style, or all saved tuners of a run.

    With --run, base, images, prompts and sampling settings are those of the run unless given.

    Example: restune evaluate --base ./stable-diffusion-v1-5 --tuner out/watercolor.safetensors
    --data ./held-out --training-images ./watercolors --output ./evaluation

    Example: restune evaluate --run ./out
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    run_folder: Annotated[Path | None, tyro.conf.arg(name="run")] = None
    """Output folder of a training run or a sweep, to evaluate all its saved tuners: those of --save-every, the best
    and the finished one, and checkpoints of other steps."""
    base: str | None = None
    """Stable Diffusion 1.x, 2.x or XL: a folder in diffusers' format, one safetensors file, or a hub repository id."""
    vae: str | None = None
    """Autoencoder (VAE) instead of the base's own: a folder of an AutoencoderKL, a safetensors file, or a hub
    repository id."""
    tuner: str | None = None
    """Tuner file, optionally with its weight after a colon: `ink.safetensors:0.8`; the default weight is 1."""
    data: Path | None = None
    """Folder of captioned images of the style, in the format of a training folder, without training images."""
    output: Path | None = None
    """Folder for report.md, report.json and grid.png; with --run, the folder `evaluation` of the run if not given."""
    training_images: Path | None = None
    """Folder of the training images, to detect memorization."""
    prompts: tuple[str, ...] | None = None
    """Further prompts for the grid of --run; without held-out images, the metrics are measured on them."""
    drift_prompts: tuple[str, ...] | None = None
    """Prompts that do not name the style, to measure unwanted changes."""
    steps: int | None = Field(default=None, gt=0)
    """Denoising steps; 20, or those of the run's samples, if not given."""
    guidance: float | None = Field(default=None, ge=0)
    """Classifier-free guidance scale; 4, or that of the run's samples, if not given."""
    seed: int | None = None
    """Seed of the first image, 0 or that of the run's samples if not given; image i uses seed + i."""
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
        output = self._output()
        outputs = [output / name for name in ("report.md", "report.json", "grid.png")]
        with stoppable(lambda: f"no report is written to {output}"):
            self.check_outputs(*outputs)
            if self.data is not None:
                check_data(self.data)
            if self.training_images is not None:
                check_data(self.training_images, "folder of training images")
            check_device(self.device)
            evaluation = self._evaluate(output) if self.run_folder is None else self._evaluate_run(output)
            print(evaluation.table(), *evaluation.remarks, sep="\n")
        for path in outputs:
            print(path)

    def _output(self) -> Path:
        if self.run_folder is not None:
            if self.tuner is not None:
                raise RestuneError("--run evaluates the saved tuners of a run, so leave --tuner out, or --run.")
            return self.output or self.run_folder / "evaluation"
        needed = {"--base": self.base, "--tuner": self.tuner, "--data": self.data, "--output": self.output}
        missing = [name for name, value in needed.items() if value is None]
        if missing:
            raise UsageError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; or give --run.")
        if self.prompts is not None:
            raise RestuneError("--prompts is for the grid of --run; give captions in the folder of --data instead.")
        assert self.output is not None
        return self.output

    def _evaluate(self, output: Path) -> Evaluation:
        assert self.base is not None
        assert self.tuner is not None
        assert self.data is not None
        tuner, weight = split_weight(self.tuner)
        check_base(self.base, self.vae)
        check_tuners([tuner])
        pipeline = self._load(self.base, self.vae)
        from ..evaluation import evaluate_tuner

        return evaluate_tuner(
            pipeline,
            tuner,
            self.data,
            output,
            weight=weight,
            training_images=self.training_images,
            drift_prompts=self.drift_prompts or (),
            steps=20 if self.steps is None else self.steps,
            guidance=4.0 if self.guidance is None else self.guidance,
            seed=self.seed or 0,
            limit=self.limit,
            batch_size=self.batch_size,
            vae=self.vae,
        )

    def _evaluate_run(self, output: Path) -> Evaluation:
        assert self.run_folder is not None
        from ..training.validation.saved_tuners import find_saved_tuners

        saved = find_saved_tuners(self.run_folder)
        base, vae = self.base or saved.config.base, self.vae or saved.config.vae
        check_base(base, vae)
        pipeline = self._load(base, vae)
        from ..training.validation.run_evaluation import Overrides, evaluate_run

        names = ("data", "training_images", "prompts", "drift_prompts", "steps", "guidance", "seed", "limit")
        given = Overrides(**{name: getattr(self, name) for name in names}, batch_size=self.batch_size)
        return evaluate_run(saved, pipeline, output, given)

    def _load(self, base: str, vae: str | None) -> Any:
        from .quiet import quiet_libraries

        quiet_libraries()
        from .options.placement import load_placed

        pipeline = load_placed(base, self.device, self.dtype, vae)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
