"""Training on an inpainting base, whose input is the noisy latent, a mask and a masked image."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from restune_diffusion import RestuneStableDiffusionInpaintPipeline, RestuneStableDiffusionPipeline
from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.pipelines.load_base import load_base, sampling_pipeline
from restune_diffusion.storage.tuner_file import load_tuner
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.frozen_base import check_trainable
from restune_diffusion.training.latents.batches import Batch, Batches
from restune_diffusion.training.latents.cache import build_cache
from restune_diffusion.training.latents.inpainting import InpaintingInputs, draw_mask, validation_inputs
from restune_diffusion.training.latents.precision import held_encoder
from restune_diffusion.training.losses.objective import Objective
from restune_diffusion.utils.errors import TrainingError

from ... import tiny_training as tiny
from ...unit.training.test_train import assert_same

MakeConfig = Callable[..., TrainConfig]
CPU = torch.device("cpu")


def with_channels(pipeline: Any, channels: int, kind: Any, **options: Any) -> Any:
    """Copy of a pipeline with a U-Net of the given number of input channels."""
    torch.manual_seed(1)
    settings = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    unet = UNet2DConditionModel(**{**settings, "in_channels": channels}).eval()
    made = kind(**{**pipeline.components, "unet": unet}, **options)
    made.set_progress_bar_config(disable=True)
    return made


def sd_inpainting(kind: Any = StableDiffusionInpaintPipeline) -> Any:
    return with_channels(tiny.sd_pipeline(), 9, kind, requires_safety_checker=False)


def sdxl_inpainting() -> Any:
    return with_channels(tiny.sdxl_pipeline(), 9, StableDiffusionXLInpaintPipeline, add_watermarker=False)


def batches(pipeline: Any, images: Path, size: int = 2) -> Batches:
    cache = build_cache(pipeline, load_samples(find_examples(images), 16), keep_images=True)
    inputs = InpaintingInputs(pipeline.vae, cache.images)
    return Batches(cache, seed=0, size=size, timesteps=1000, caption_dropout=0.0, device=CPU, dtype=torch.float32,
                   inpainting=inputs)  # fmt: skip


def test_a_quarter_of_the_masks_hides_everything_and_the_others_a_box_or_an_ellipse() -> None:
    masks = [draw_mask(64, 48, torch.Generator().manual_seed(seed))[0] for seed in range(400)]
    assert all(mask.unique().tolist() in ([0.0, 1.0], [1.0]) for mask in masks)
    whole = [mask for mask in masks if mask.all()]
    assert 0.19 < len(whole) / 400 < 0.31
    fills = []
    for mask in masks:
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        box = mask[int(rows.min()) : int(rows.max()) + 1, int(columns.min()) : int(columns.max()) + 1]
        if not mask.all() and min(box.shape) >= 10:
            fills.append(float(box.mean()))
    boxes = sum(fill == 1 for fill in fills)
    ellipses = sum(abs(fill - math.pi / 4) < 0.05 for fill in fills)
    assert boxes + ellipses == len(fills)
    assert 0.4 < boxes / len(fills) < 0.6
    sizes = torch.tensor([float(mask.mean()) for mask in masks if not mask.all()])
    assert sizes.min() < 0.05
    assert sizes.max() > 0.7
    assert torch.stack(masks).mean(dim=0)[[0, 0, -1, -1], [0, -1, 0, -1]].min() > 0.2, "corners are hidden too"


@pytest.mark.parametrize("make", [sd_inpainting, sdxl_inpainting], ids=["sd", "sdxl"])
def test_mask_and_masked_latent_are_those_of_the_pipeline(images: Path, make: Callable[[], Any]) -> None:
    pipeline = make()
    cache = build_cache(pipeline, load_samples(find_examples(images), 16), keep_images=True)
    made = InpaintingInputs(pipeline.vae, cache.images)([3, 1], [torch.Generator().manual_seed(n) for n in (5, 6)])
    assert made.shape == (2, 5, 8, 8)
    for row, (index, seed) in enumerate([(3, 5), (1, 6)]):
        generator = torch.Generator().manual_seed(seed)
        mask = draw_mask(16, 16, generator)
        image = Image.fromarray(cache.images[index].permute(1, 2, 0).numpy())
        hidden = pipeline.image_processor.preprocess(image) * (mask[None] < 0.5)
        arguments = (mask[None], hidden, 1, 16, 16, torch.float32, CPU, generator, False)
        small, latents = pipeline.prepare_mask_latents(*arguments)
        assert torch.equal(made[row, :1], small[0])
        torch.testing.assert_close(made[row, 1:], latents[0], rtol=1e-5, atol=1e-5)


def test_the_denoiser_gets_noisy_latents_then_mask_then_masked_latents(config: MakeConfig, images: Path) -> None:
    pipeline, seen = sd_inpainting(), []
    pipeline.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    train(config(steps=1, batch_size=3), pipeline=pipeline, verbose=False)
    batch = batches(pipeline, images, size=3)[0]
    noisy = Objective(pipeline.scheduler).add_noise(batch.latents, batch.noise, batch.timesteps)
    assert batch.inpainting is not None
    mask, masked = batch.inpainting[:, :1], batch.inpainting[:, 1:]
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(seen[0], torch.cat([noisy, mask, masked], dim=1), rtol=1e-5, atol=1e-5)


def test_a_text_to_image_base_has_no_masks_and_trains_as_before(config: MakeConfig, images: Path) -> None:
    pipeline = tiny.sd_pipeline()
    cache = build_cache(pipeline, load_samples(find_examples(images), 16))
    assert cache.images == []
    inpainted = batches(sd_inpainting(), images)[4]
    plain = Batches(cache, seed=0, size=2, timesteps=1000, caption_dropout=0.0, device=CPU, dtype=torch.float32)[4]
    assert torch.equal(plain.noise, inpainted.noise), "masks use the last random numbers of a sample"
    assert torch.equal(plain.timesteps, inpainted.timesteps)


def fixed_loss(pipeline: Any, batch: Batch, tuner: Any) -> float:
    from restune_diffusion import attach

    objective = Objective(pipeline.scheduler)
    sample = batch.denoiser_sample(objective.add_noise(batch.latents, batch.noise, batch.timesteps))
    with attach(pipeline.unet, tuner), torch.no_grad():
        prediction = pipeline.unet(sample, batch.timesteps, return_dict=False, **batch.inputs)[0]
    target = objective.target(batch.latents, batch.noise, batch.timesteps)
    return objective.loss(prediction, target, batch.timesteps).item()


@pytest.mark.parametrize(
    ("make", "kind"), [(sd_inpainting, "skip"), (sd_inpainting, "bypass"), (sdxl_inpainting, "skip")]
)
def test_training_lowers_the_loss(
    config: MakeConfig, images: Path, tmp_path: Path, make: Callable[[], Any], kind: str
) -> None:
    pipeline = make()
    before = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    start = train(config(tuner=kind, steps=1, learning_rate=1e-12, output=tmp_path / "start"), pipeline=pipeline,
                  verbose=False)  # fmt: skip
    result = train(config(tuner=kind, steps=25, batch_size=4, learning_rate=1e-2), pipeline=pipeline, verbose=False)
    batch = batches(pipeline, images, size=12)[0]
    first, last = (fixed_loss(pipeline, batch, load_tuner(each.path)) for each in (start, result))
    assert last < 0.95 * first, (first, last)
    after = pipeline.unet.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_resuming_changes_nothing(config: MakeConfig, tmp_path: Path) -> None:
    settings = {"steps": 4, "checkpoint_every": 2, "noise_offset": 0.1}
    whole = train(config(output=tmp_path / "whole", **settings), pipeline=sd_inpainting(), verbose=False)
    part = config(output=tmp_path / "part", **{**settings, "steps": 2})
    train(part, pipeline=sd_inpainting(), verbose=False)
    rest = part.model_copy(update={"steps": 4, "resume": True})
    resumed = train(rest, pipeline=sd_inpainting(), verbose=False)
    assert resumed.losses == whole.losses[2:]
    assert_same(whole.path, resumed.path)


def test_a_checkpoint_from_disk_trains_and_its_tuner_acts_where_it_can_be_used(
    config: MakeConfig, tmp_path: Path
) -> None:
    sd_inpainting().save_pretrained(tmp_path / "base")
    settings = config(base=str(tmp_path / "base"), steps=4, learning_rate=1e-2, output=tmp_path / "out",
                      validation={"prompts": ["a red disc", "a blue disc"], "steps": 2})  # fmt: skip
    result = train(settings, verbose=False)
    pipe = load_base(settings.base, torch.float32)
    assert isinstance(pipe, RestuneStableDiffusionInpaintPipeline)
    pipe.set_progress_bar_config(disable=True)
    samples = load_samples(find_examples(settings.data.folder), 16)
    (first, second) = validation_inputs(build_cache(pipe, samples, keep_images=True).images, 2, 0)

    def generate(inputs: dict[str, Image.Image], prompt: str) -> Image.Image:
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt, **inputs, strength=1.0, num_inference_steps=2, generator=generator).images[0]

    plain = generate(first, "a red disc")
    pipe.load_tuner_weights(result.path)
    tuned = [generate(first, "a red disc"), generate(second, "a blue disc")]
    assert tuned[0].tobytes() != plain.tobytes()
    for number, image in enumerate(tuned):
        assert Image.open(result.samples[-1] / f"{number:02d}.png").tobytes() == image.tobytes()
    pipe.unload_tuner_weights()
    assert generate(first, "a red disc").tobytes() == plain.tobytes()

    text_to_image = RestuneStableDiffusionPipeline(**tiny.sd_pipeline().components, requires_safety_checker=False)
    text_to_image.load_tuner_weights(result.path)
    assert text_to_image.get_active_tuners()


def test_the_masks_of_the_samples_hide_a_part() -> None:
    images = [torch.full((3, 16, 16), 9, dtype=torch.uint8)] * 2
    for inputs in validation_inputs(images, 5, seed=3):
        values = inputs["mask_image"].getextrema()
        assert values == (0, 255)
        assert inputs["image"].getpixel((0, 0)) == (9, 9, 9)


def test_what_does_not_fit_an_inpainting_base_is_refused(config: MakeConfig) -> None:
    with pytest.raises(TrainingError, match="encodes masked images in each step; leave drop_encoders out"):
        train(config(drop_encoders=True, base=str(_saved(config))), verbose=False)
    odd = with_channels(tiny.sd_pipeline(), 5, StableDiffusionInpaintPipeline, requires_safety_checker=False)
    with pytest.raises(TrainingError, match=r"takes 5 channels.*text-to-image checkpoint, which takes 4.*takes 9"):
        check_trainable(odd)


def _saved(config: MakeConfig) -> Path:
    path = config().output.parent / "inpainting-base"
    sd_inpainting().save_pretrained(path)
    return path


def test_an_inpainting_pipeline_around_a_text_to_image_base_trains_as_text_to_image(config: MakeConfig) -> None:
    pipeline = with_channels(tiny.sd_pipeline(), 4, StableDiffusionInpaintPipeline, requires_safety_checker=False)
    assert isinstance(sampling_pipeline(pipeline), RestuneStableDiffusionPipeline)
    assert train(config(steps=1), pipeline=pipeline, verbose=False).path.is_file()


def test_masked_images_are_encoded_without_casting_the_vae_in_each_step(
    config: MakeConfig, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    casts: list[Any] = []
    move = AutoencoderKL.to

    def counted(vae: Any, *args: Any, **kwargs: Any) -> Any:
        casts.extend(arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.dtype))
        return move(vae, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "to", counted)
    counts = []
    for steps in (1, 3):
        pipeline = sd_inpainting().to(torch.bfloat16)
        casts.clear()
        train(
            config(steps=steps, mixed_precision="bf16", output=tmp_path / str(steps)), pipeline=pipeline, verbose=False
        )
        counts.append(len(casts))
        assert pipeline.vae.dtype == torch.bfloat16
    assert counts[0] == counts[1]


def test_the_held_encoder_gives_the_latents_of_the_vae_in_fp32(images: Path) -> None:
    pipeline = sd_inpainting()
    plain = pipeline.vae.float()
    assert held_encoder(plain) is plain
    half = copy.deepcopy(plain).to(torch.bfloat16)
    held = held_encoder(half)
    assert half.dtype == torch.bfloat16
    assert {each.dtype for each in held.parameters()} == {torch.float32}
    assert held.decoder is None
    assert half.decoder is not None
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = copy.deepcopy(half).float().encode(pixels).latent_dist
        assert torch.equal(held.encode(pixels).latent_dist.mean, expected.mean)
