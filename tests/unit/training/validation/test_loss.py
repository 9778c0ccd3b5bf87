"""Validation loss of every kind of run: a tuner that does nothing yet has the base's loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from restune_diffusion.pipelines.load_base import load_base
from restune_diffusion.training import TrainConfig, sweep
from restune_diffusion.training.build import build_accelerator, build_training_state
from restune_diffusion.training.inputs import prepared
from restune_diffusion.training.sweeps.report import SweepResult
from restune_diffusion.training.trainer import acting
from restune_diffusion.training.validation.held_out import HeldOut
from restune_diffusion.training.validation.loss import TIMESTEPS, held_out_batches, held_out_loss
from restune_diffusion.utils.errors import DataError
from restune_diffusion.utils.seeds import seeded

from .... import tiny_training as tiny
from ....integration.training.test_inpainting import sd_inpainting

MakeConfig = Callable[..., TrainConfig]
HOLDOUT = {"holdout": 2}


def measured(config: TrainConfig, pipeline: Any = None) -> tuple[float, HeldOut]:
    """The loss before the first step."""
    accelerator = build_accelerator(config)
    with prepared(config, accelerator, pipeline) as inputs:
        run = build_training_state(config, accelerator, inputs)
        assert inputs.held_out is not None
        with acting(run):
            return held_out_loss(run, inputs.held_out, inputs.encoder), inputs.held_out


@torch.no_grad()
def loss_of_the_base(base: Path, held_out: HeldOut) -> float:
    """The same, in the fewest lines that could be right."""
    pipeline = load_base(str(base), torch.float32)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    losses = []
    for entry, latent in zip(held_out.entries, held_out.cache.latents, strict=True):
        states = pipeline.encode_prompt(entry.caption, "cpu", 1, False)[0]
        for part in range(8):
            generator = seeded(0, f"held out {entry.digest.hex()}", part)
            clean = latent.draw(generator)[None]
            noise = torch.randn(clean.shape, generator=generator)
            time = torch.tensor([125 * part + 62])
            noisy = noise_scheduler.add_noise(clean, noise, time)
            losses.append((pipeline.unet(noisy, time, states).sample - noise).square().mean().item())
    assert len(losses) == TIMESTEPS * len(held_out.entries)
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_size": 5, "seed": 3, "noise_offset": 0.2, "caption_dropout": 0.5, "min_timestep": 700},
        {"tuner": "bypass"},
        {"tuner": "control", "control": {"conditions": ["palette"]}},
        {"tuner": "text", "text": {"rank": 2}},
        {"masked_loss": "alpha"},
        {"crop": "random", "flip": True},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_the_loss_before_the_first_step_is_that_of_the_base(
    config: MakeConfig, base: Path, settings: dict[str, Any]
) -> None:
    loss, held_out = measured(config(validation=HOLDOUT, **settings))
    assert loss == pytest.approx(loss_of_the_base(base, held_out), rel=1e-5)


def test_a_mask_limits_the_loss_to_its_part(config: MakeConfig, images: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in images.glob("*.png"):
        mask = Image.new("L", (24, 20))
        mask.paste(255, (0, 0, 12, 20))
        mask.save(masks / path.name)
    loss = {
        weight: measured(config(validation=HOLDOUT, masked_loss="files", mask_data=masks, unmasked_weight=weight))[0]
        for weight in (0.0, 0.5, 1.0)
    }
    whole, _ = measured(config(validation=HOLDOUT))
    assert loss[1.0] == pytest.approx(whole, rel=1e-6)
    assert loss[0.0] != pytest.approx(whole, rel=1e-3)
    # Half of the image has weight 1, the other half 0.5; one column of the latent lies between them.
    other = 2 * whole - loss[0.0]
    assert loss[0.5] == pytest.approx((loss[0.0] + 0.5 * other) / 1.5, rel=3e-3)


def test_images_of_several_sizes_are_measured_size_by_size(config: MakeConfig, base: Path, tmp_path: Path) -> None:
    data = tmp_path / "shapes"
    data.mkdir()
    for number, size in enumerate([(40, 16), (16, 40), (32, 32), (41, 16), (16, 41), (33, 32)]):
        tiny.draw_image("red", size).save(data / f"{number}.png")
    settings = {"data": data, "prompt": "a disc", "bucketing": True, "resolution": 32, "batch_size": 2}
    accelerator = build_accelerator(config(validation={"holdout": 5}, **settings))
    with prepared(config(validation={"holdout": 5}, **settings), accelerator) as inputs:
        run = build_training_state(config(validation={"holdout": 5}, **settings), accelerator, inputs)
        held_out = inputs.held_out
        assert held_out is not None
        batches = list(held_out_batches(run, held_out))
        assert sum(len(batch.latents) for batch in batches) == 5 * TIMESTEPS
        assert (
            len({tuple(batch.latents.shape[1:]) for batch in batches}) == len({e.size for e in held_out.entries}) > 1
        )
        loss = held_out_loss(run, held_out)
    assert loss == pytest.approx(loss_of_the_base(base, held_out), rel=1e-5)


@pytest.mark.parametrize("make", [tiny.sdxl_pipeline, sd_inpainting], ids=["sdxl", "inpainting"])
def test_other_bases_have_the_same_draws_in_every_run(config: MakeConfig, make: Callable[[], Any]) -> None:
    pipeline = make()
    first, held_out = measured(config(validation=HOLDOUT), pipeline)
    second, _ = measured(config(validation=HOLDOUT, seed=4, batch_size=1), pipeline)
    assert first == pytest.approx(second, rel=1e-5)
    assert bool(held_out.cache.images) == (make is sd_inpainting)


def test_repeats_count_for_training_alone(config: MakeConfig, images: Path, tmp_path: Path) -> None:
    data = tmp_path / "kohya"
    for folder, colors in (("9_red", ["red", "teal"]), ("1_blue", ["blue", "green"])):
        tiny.write_images(data / folder, colors)
        (data / folder / "metadata.jsonl").unlink()
    _, held_out = measured(config(data=data, folder_repeats=True, validation={"holdout": 3}))
    assert len(held_out.entries) == len(held_out.cache.latents) == 3


def test_a_holdout_folder_of_a_control_tuner_needs_the_same_conditions(
    config: MakeConfig, images: Path, tmp_path: Path
) -> None:
    held, hints = tmp_path / "held", tmp_path / "hints"
    tiny.write_images(held, ["gray"])
    hints.mkdir()
    settings = {"tuner": "control", "validation": {"holdout": held}}
    for path in images.glob("*.png"):
        Image.open(path).save(hints / path.name)
    with pytest.raises(
        DataError, match=r"have the conditions palette \(made from the images\), but the training images"
    ):
        measured(config(control_data=hints, control={"conditions": ["palette"]}, **settings))
    loss, held_out = measured(config(control={"conditions": ["palette"]}, **settings))
    assert loss > 0
    assert len(held_out.cache.conditions[0]) == 1


def test_the_tuners_of_a_sweep_share_the_held_out_images(config: MakeConfig, tmp_path: Path) -> None:
    swept: SweepResult = sweep(
        config(tuner="bypass", steps=2, sweep="seed=0,1 lr=1e-3,1e-2", validation=HOLDOUT, patience=1, keep="best"),
        verbose=False,
    )
    losses = [row.validation_loss for row in swept.rows]
    assert len({*losses}) == 4
    starts = {(tmp_path / "out" / row.name / "metrics.jsonl").read_text().splitlines()[0] for row in swept.rows}
    assert len(starts) == 1
    assert "validation_loss" in starts.pop()
    assert all((tmp_path / "out" / row.name / f"{row.name}.best.safetensors").is_file() for row in swept.rows)
    order = [line.split()[3] for line in swept.table().splitlines()]
    assert order == ["validation", *(f"{loss:.4f}" for loss in sorted(each for each in losses if each is not None))]
