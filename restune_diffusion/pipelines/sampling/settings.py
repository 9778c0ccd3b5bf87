"""Settings of generated images: base, prompts, tuners and sampler settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...utils.errors import RestuneError
from .mix import MixSettings

if TYPE_CHECKING:
    from ...hooks.weights import TunerWeight


class SamplingSettings(MixSettings):
    """Base, prompts, tuners and sampler settings of generated images."""

    base: str
    """Stable Diffusion 1.x, 2.x or XL: a folder in diffusers' format, one safetensors file, or a hub repository id."""
    vae: str | None = None
    """Autoencoder (VAE) instead of the base's own: a folder of an AutoencoderKL, a safetensors file, or a hub
    repository id."""
    prompt: tuple[str, ...] = Field(min_length=1)
    """One or more prompts."""
    negative_prompt: str | None = None
    """Negative prompt: content to avoid."""
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """Seed of the first image of every prompt; image i uses seed + i."""
    images: int = Field(default=1, gt=0)
    """Images per prompt."""
    steps: int = Field(default=50, gt=0)
    """Denoising steps."""
    guidance: float = Field(default=7.5, ge=0)
    """Classifier-free guidance scale."""
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)
    """Rescaling of the guided prediction to the contrast of the unguided one; about 0.7 for bases with v-prediction
    and zero terminal SNR."""
    scheduler: str | None = None
    """Scheduler: ddim, ddpm, deis, dpm2, dpm2_a, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, euler, euler_a, heun, lcm,
    pndm, tcd or unipc, most also with `_karras`, `_exponential` or `_beta`, as in `dpmpp_2m_karras`; the base's own if
    not given. Prediction type and noise schedule are those of the base."""
    clip_skip: int | None = Field(default=None, gt=0)
    """Text encoder layer that conditions the image, counted from the last as in A1111 and sd-scripts: 1 is the last
    layer, 2 the one before. SD 1.x and 2.x use 1 by default, XL uses 2."""
    width: int | None = Field(default=None, gt=0)
    """Width in pixels; the base's native size if not given."""
    height: int | None = Field(default=None, gt=0)
    """Height in pixels; the base's native size if not given."""
    init_image: Path | None = None
    """Image to start from (image-to-image), resized and cropped to the size of the generated images."""
    strength: float | None = Field(default=None, gt=0, le=1)
    """Change of the initial image, from 0 to 1 (all new); 0.8 if not given."""
    control_image: tuple[str, ...] = ()
    """Condition images for control tuners: FILE, or CONDITION=FILE if the tuners take several conditions."""
    control_from: tuple[str, ...] = ()
    """Source images to compute condition images from: FILE or CONDITION=FILE, for the conditions canny, palette, blur
    and mask."""
    control_scale: float = 1.0
    """Conditioning scale: factor on the residuals of the conditions."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Compute device; `auto` uses a GPU if there is one."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Precision; `auto` is fp16 on a GPU and fp32 on the CPU."""

    @property
    def seeds(self) -> range:
        """Seeds of the images of each prompt."""
        return range(self.seed, self.seed + self.images)

    def check(self) -> dict[str, tuple[str, TunerWeight]]:
        """Check the settings that need no base, before a large checkpoint is loaded.

        Returns:
            File and weight of each tuner, by name.

        Raises:
            RestuneError: if a setting is malformed, or an image cannot be read.
        """
        from ...imaging.image_files import open_image
        from ..schedulers import check_scheduler_name

        weights = self.weights()
        if self.scheduler is not None:
            check_scheduler_name(self.scheduler)
        if self.strength is not None and self.init_image is None:
            raise RestuneError("--strength needs an image to start from; give one with --init-image.")
        if self.init_image is not None:
            open_image(self.init_image)
        if self.control_scale != 1 and not (self.control_image or self.control_from):
            raise RestuneError("--control-scale needs condition images; give them with --control-image.")
        return weights

    def prepare(self, pipeline: Any, weights: dict[str, tuple[str, TunerWeight]]) -> Any:
        """Return the pipeline of these settings: with their scheduler and their tuners.

        Args:
            pipeline: pipeline of the base; its scheduler is replaced.
            weights: the result of `check`.

        Raises:
            RestuneError: if a setting or a tuner does not fit the base.
        """
        from ..call_options import image_size
        from ..schedulers import named_scheduler
        from .mix import load_tuners

        if self.scheduler is not None:
            pipeline.scheduler = named_scheduler(self.scheduler, pipeline.scheduler)
        trained = pipeline.scheduler.config.num_train_timesteps
        if self.steps > trained:
            raise RestuneError(f"--steps {self.steps} is more than the {trained} timesteps of the base; use fewer.")
        pipeline = pipeline_for(pipeline, from_image=self.init_image is not None)
        image_size(pipeline, self.width, self.height)
        load_tuners(pipeline, weights, len(self.lora))
        return pipeline

    def arguments(self, pipeline: Any) -> dict[str, Any]:
        """Return the pipeline's arguments for all images: all except prompt and generator.

        Raises:
            RestuneError: if a setting does not fit the base or the pipeline.
        """
        import inspect

        from ...imaging.image_files import fitted_image, open_image
        from ..call_options import image_size
        from ..clip_skip import clip_skip_arguments
        from .control_images import read_control_images

        width, height = image_size(pipeline, self.width, self.height)
        arguments = {
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "tuner_image": read_control_images(pipeline, self.control_image, self.control_from, (width, height)),
            "tuner_conditioning_scale": self.control_scale,
        }
        if self.clip_skip is not None:
            arguments |= clip_skip_arguments(pipeline, self.clip_skip)
        if self.guidance_rescale:
            if "guidance_rescale" not in inspect.signature(type(pipeline).__call__).parameters:
                raise RestuneError(
                    "--guidance-rescale has no effect with --init-image on this base; leave out one of them."
                )
            arguments["guidance_rescale"] = self.guidance_rescale
        if self.init_image is None:
            return {**arguments, "width": width, "height": height}
        image = fitted_image(open_image(self.init_image), (width, height)).convert("RGB")
        return {**arguments, "image": image, "strength": self.strength or DEFAULT_STRENGTH}


DEFAULT_STRENGTH = 0.8


def generator(seed: int) -> Any:
    """Return a generator on the CPU, which gives the same noise for a seed on every machine."""
    import torch

    return torch.Generator("cpu").manual_seed(seed)


def pipeline_for(pipeline: Any, *, from_image: bool) -> Any:
    """Return the pipeline that generates from noise or from an image, with the models of a loaded one.

    Raises:
        RestuneError: if the base is an inpainting model.
    """
    from diffusers import StableDiffusionXLPipeline

    from .. import RestuneStableDiffusionImg2ImgPipeline, RestuneStableDiffusionXLImg2ImgPipeline
    from ..load_base import is_inpainting

    if is_inpainting(pipeline):
        raise RestuneError(
            "The base is an inpainting model, which needs a mask for each image; use "
            "RestuneStableDiffusionInpaintPipeline in Python, or a text-to-image base."
        )
    if not from_image:
        return pipeline
    is_xl = isinstance(pipeline, StableDiffusionXLPipeline)
    image_class: Any = RestuneStableDiffusionXLImg2ImgPipeline if is_xl else RestuneStableDiffusionImg2ImgPipeline
    return image_class.from_pipe(pipeline)
