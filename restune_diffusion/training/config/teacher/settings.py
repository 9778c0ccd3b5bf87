"""Settings of distillation from another tuner."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from ....utils.setting_groups import SettingGroup, setting

_OF_DRAWS = ("latents", "steps", "guidance", "batch_size", "folder")


class TeacherConfig(SettingGroup):
    """Distillation: the tuner learns the predictions of another tuner, its teacher."""

    # Not recorded here, so that the records of earlier releases hold; the file records the teacher's hash instead.
    file: str | None = setting(None, flat="teacher", affects="batches", recorded=False)
    """Tuner or LoRA file of diffusers or kohya to learn from, optionally with its weight after a colon:
    `pixel.safetensors:0.8`. With --teacher-prompts or --prompts-file no images are needed; with --data the predictions
    for these images are learned."""
    prompts: tuple[str, ...] = setting((), flat="teacher_prompts", affects="batches", recorded=False)
    """Prompts for training without images: the base with the teacher generates latents from them."""
    prompts_file: Path | None = setting(None, affects="batches", recorded=False)
    """Text file with one such prompt per line, or a folder of `.txt` or `.caption` files with one caption each."""
    loss_weight: float = setting(1.0, flat="teacher_loss_weight", affects="batches", recorded=False, gt=0, le=1)
    """Share of the teacher in the loss. The rest is the ordinary loss on the images of --data."""
    latents: int | None = setting(None, flat="teacher_latents", affects="batches", recorded=False, gt=0)
    """Number of latents to generate; the prompts take turns. If not set, 128, or one per prompt if there are more."""
    steps: int = setting(20, flat="teacher_steps", affects="batches", recorded=False, gt=0)
    """Denoising steps of each of these latents."""
    guidance: float = setting(4.0, flat="teacher_guidance", affects="batches", recorded=False, ge=0)
    """Classifier-free guidance scale of these latents."""
    batch_size: int = setting(4, flat="teacher_batch_size", affects="batches", recorded=False, gt=0)
    """Latents generated at once; lower it if they do not fit into memory."""
    folder: Path | None = setting(None, flat="teacher_latents_dir", affects="output", recorded=False)
    """Folder for generated latents, which several runs may share. If not set, OUTPUT/teacher-latents."""

    @property
    def generates(self) -> bool:
        """Whether the run trains on generated latents instead of images."""
        return self.file is not None and bool(self.prompts or self.prompts_file)

    @model_validator(mode="after")
    def _settings_fit_together(self) -> TeacherConfig:
        default = type(self).model_construct()
        if self.file is None:
            changed = [name for name in type(self).model_fields if getattr(self, name) != getattr(default, name)]
            if changed:
                raise ValueError("settings of a teacher are given, but no teacher; add --teacher FILE")
            return self
        if self.prompts and self.prompts_file is not None:
            raise ValueError("teacher_prompts and prompts_file are both given; keep one")
        if any(not prompt.strip() for prompt in self.prompts):
            raise ValueError("teacher_prompts has an empty prompt; remove it")
        drawn = [name for name in _OF_DRAWS if getattr(self, name) != getattr(default, name)]
        if drawn and not self.generates:
            raise ValueError(
                "settings of generated latents are given, but no prompts to generate from; "
                "add --teacher-prompts or --prompts-file, or leave them out"
            )
        if self.generates and self.loss_weight != 1:
            raise ValueError(
                "teacher_loss_weight below 1 adds the loss on images, but there are none; "
                "give --data instead of prompts, or leave teacher_loss_weight out"
            )
        return self
