"""Training data without images: clean latents that the base generates with the teacher.

Clean latents take the place of encoded images, so a run adds noise to them at its own timestep distribution, and each
latent is used at many timesteps. Latents along a denoising trajectory would each fix one noise and one timestep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ...backbones import text_encoders
from ...data.data_sheet import DataSheet, Entry
from ...data.example import Example
from ...data.image_files import SizeConditioning
from ...pipelines.load_base import is_inpainting, sampling_pipeline
from ...utils.errors import TrainingError
from ...utils.seeds import derived_seed
from ..config.train_config import TrainConfig
from ..feature_cache.use import hash_of_models
from ..latents.cache import Cache, Latent
from ..latents.text_conditioning import encode_caption, encode_empty_caption
from ..losses.objective import scheduler_changes
from .latent_store import LatentStore
from .teacher import Teacher


def generated_cache(
    config: TrainConfig,
    accelerator: Accelerator,
    pipeline: Any,
    teacher: Teacher,
    examples: Sequence[Example],
    resolution: int,
    sheet: DataSheet,
    verbose: bool = False,
) -> Cache:
    """Generate a latent for each example, and return the training data; latents on disk are used again.

    Args:
        config: settings of the run.
        accelerator: accelerator of the run; each process generates a share.
        pipeline: the base, without tuners.
        teacher: the teacher, which acts during the generation.
        examples: prompt of each latent.
        resolution: side of the images in pixels.
        sheet: report of the data, to which the latents are added.
        verbose: whether to show a progress bar.

    Raises:
        TrainingError: if the base is for inpainting, or a latent is not finite.
        TunerFileError: if a file cannot be written.
    """
    if is_inpainting(pipeline):
        raise TrainingError(
            "An inpainting base cannot generate latents from prompts alone; give --data instead of prompts."
        )
    settings = config.teacher
    prompts = [example.caption for example in examples]
    changes = scheduler_changes(config.loss.prediction_type, config.loss.rescale_betas_zero_snr)
    sampler = sampling_pipeline(pipeline, changes)
    identity = {
        "models": hash_of_models(pipeline),
        "scheduler": {"class": type(sampler.scheduler).__name__, **_plain(sampler.scheduler.config)},
        "teacher": teacher.record.sha256,
        "weight": teacher.record.weight,
        "prompts": prompts,
        "resolution": resolution,
        "seed": config.seed,
        "steps": settings.steps,
        "guidance": settings.guidance,
        # Latents of a larger batch may differ in the last digits.
        "batch size": settings.batch_size,
    }
    store = LatentStore(settings.folder or config.output / "teacher-latents", identity)
    numbers = range(len(prompts))
    batches = [numbers[first : first + settings.batch_size] for first in range(0, len(numbers), settings.batch_size)]

    def generate(batch: Sequence[int]) -> torch.Tensor:
        seeds = [derived_seed(config.seed, "teacher latent", number) for number in batch]
        latents: torch.Tensor = sampler(
            [prompts[number] for number in batch],
            height=resolution,
            width=resolution,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="latent",
        ).images
        if not bool(latents.isfinite().all()):
            raise TrainingError(
                f"The base with the teacher {teacher.record.file} generates NaN or infinite latents; use a smaller "
                f"weight of the teacher, or --mixed-precision bf16 or no instead of fp16."
            )
        return latents

    share = batches[accelerator.process_index :: accelerator.num_processes]
    shown = verbose and accelerator.is_main_process
    with (
        teacher.attached_whole(pipeline),
        tqdm(total=sum(map(len, share)), desc="teacher's latents", unit="latent", disable=not shown) as bar,
    ):
        store.complete(share, generate, bar.update)
        accelerator.wait_for_everyone()
        # If the processes share no disk, each machine generates the rest itself.
        store.complete(batches, generate)
    return _cache(pipeline, examples, store.read(batches), resolution, sheet)


def _plain(config: Any) -> dict[str, Any]:
    return {name: str(value) for name, value in config.items() if not name.startswith("_")}


def _cache(
    pipeline: Any, examples: Sequence[Example], latents: Sequence[torch.Tensor], resolution: int, sheet: DataSheet
) -> Cache:
    prompts = [example.caption for example in examples]
    digests = [
        hashlib.sha256(latent.numpy().tobytes() + prompt.encode() + b"\0").digest()
        for latent, prompt in zip(latents, prompts, strict=True)
    ]
    side = (resolution, resolution)
    for example, digest in zip(examples, digests, strict=True):
        sheet.entries.append(Entry(example.path.name, example.caption, side, side, 1, 1, digest))
    sheet.count_tokens([encoder.tokenizer for encoder in text_encoders(pipeline).values()])
    return Cache(
        [Latent(latent, torch.zeros_like(latent)) for latent in latents],
        prompts,
        [SizeConditioning(side, (0, 0), side) for _ in examples],
        {prompt: encode_caption(pipeline, prompt) for prompt in dict.fromkeys(prompts)},
        encode_empty_caption(pipeline),
        digests,
        views=[[number] for number in range(len(latents))],
        repeats=[1] * len(latents),
    )
