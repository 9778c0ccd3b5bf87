"""`restune data caption`: write caption files with a captioning model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from ...data.captioning.registry import Captioner, CaptionerSettings, check_captioner_name, load_captioner
from ...utils.display import counted
from ...utils.errors import DataError, UsageError
from ...utils.settings import Settings
from ..options.early_checks import check_data, check_device
from ..options.interruption import stoppable

# Settings that a captioner reads; the others are refused beside it.
_OF_TRANSFORMERS = ("prompt", "max_tokens", "beams", "dtype")
_OF_ONNX = ("general_threshold", "character_threshold")


class CaptionOptions(Settings):
    """Write the captions of a folder of images with a captioning model, as text files beside the images.

    Images that have a caption are skipped, so the same command continues after an interruption.

    Example: restune data caption ./watercolors --captioner transformers --model ./blip-image-captioning-base

    Example: restune data caption ./watercolors --captioner onnx --model ./wd-vit-tagger-v3 --trigger-word "ink style"

    Example: restune data caption ./watercolors --captioner my_module:describe
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="data")]
    """Folder of images; subfolders are included."""
    captioner: str
    """`transformers`: an image-to-text or vision-language model; `onnx`: a tagger in WD14's layout; `MODULE:FUNCTION`:
    a function from a list of PIL images to strings."""
    model: str | None = None
    """Model of `transformers`: a folder, or a repository id on the Hub, which is downloaded; safetensors weights only.
    Model of `onnx`: a folder with model.onnx and selected_tags.csv."""
    prompt: str | None = None
    """Instruction for a chat model, or beginning of the caption for other models of `transformers`."""
    max_tokens: int = Field(default=75, gt=0)
    """Largest number of tokens of a caption of `transformers`; CLIP's text encoders read 75."""
    beams: int = Field(default=1, gt=0)
    """Beams of the search of `transformers`; 1 decodes greedily."""
    general_threshold: float = Field(default=0.35, ge=0, le=1)
    """Smallest score of a tag of `onnx`."""
    character_threshold: float = Field(default=0.85, ge=0, le=1)
    """Smallest score of a tag of `onnx` that names a character."""
    trigger_word: str | None = Field(default=None, min_length=1)
    """Word at the start of each caption that lacks it."""
    existing: Literal["skip", "overwrite", "append", "prepend", "add-line"] = "skip"
    """Treatment of images that have a caption: keep it, replace it, add the new caption behind it or before it, or add
    the new caption as a further line."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Same as `--existing overwrite`."""
    batch_size: int = Field(default=8, gt=0)
    """Images that the captioner gets at a time."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Compute device; `auto` uses a GPU if there is one."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Precision of a model of `transformers`; `auto` is fp16 on a GPU and fp32 on the CPU."""

    def run(self) -> None:
        """Caption the folder and print a summary.

        Raises:
            DataError: if no image has a caption at the end.
        """
        self._check()
        from ...data.captioning.folder import caption_folder, refusals
        from ...data.captioning.job import CaptionJob, Outcome

        existing = "overwrite" if self.overwrite else self.existing
        key = f"{self.captioner} {self._settings()}"
        job = CaptionJob(self.folder, existing, self.trigger_word, self.batch_size, key)
        outcome = Outcome()
        with stoppable(lambda: f"{counted(len(outcome.written), 'caption')} written; the same command continues"):
            from tqdm import tqdm

            with tqdm(desc="Captioning", unit="image", disable=None) as bar:

                def advance(number: int) -> None:
                    bar.total = outcome.images
                    bar.update(number)

                caption_folder(job, self._load, outcome, advance)
        for line in refusals(outcome, self.folder):
            print(line)
        print(
            f"{counted(len(outcome.written), 'caption')} written, {outcome.unchanged} unchanged, "
            f"{len(outcome.refused)} refused, of {counted(outcome.images, 'image')}."
        )
        if outcome.refused and not outcome.written and not outcome.unchanged:
            raise DataError(f"None of the images in {self.folder} could be captioned.")

    def _check(self) -> None:
        check_data(self.folder)
        check_device(self.device)
        check_captioner_name(self.captioner)
        if self.overwrite and self.existing not in ("skip", "overwrite"):
            raise UsageError(f"--overwrite and --existing {self.existing} contradict each other; give one of them.")
        foreign = {"transformers": _OF_ONNX, "onnx": _OF_TRANSFORMERS}.get(self.captioner, ())
        if ":" in self.captioner:
            foreign = ("model", *_OF_TRANSFORMERS, *_OF_ONNX, "device")
        given = [name for name in foreign if getattr(self, name) != type(self).model_fields[name].default]
        if given:
            raise UsageError(
                f"--{given[0].replace('_', '-')} is not a setting of the captioner {self.captioner}; leave it out."
            )

    def _load(self) -> Captioner:
        if self.captioner == "transformers":
            import transformers

            transformers.utils.logging.set_verbosity_error()
            transformers.utils.logging.disable_progress_bar()
        return load_captioner(self.captioner, self._settings())

    def _settings(self) -> CaptionerSettings:
        return CaptionerSettings(
            model=self.model,
            prompt=self.prompt,
            max_tokens=self.max_tokens,
            beams=self.beams,
            general_threshold=self.general_threshold,
            character_threshold=self.character_threshold,
            device=self.device,
            dtype=self.dtype,
        )
