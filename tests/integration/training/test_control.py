"""Training on triples of image, condition image and caption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.condition_source import ConditionSource
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.hooks.attachment import attach
from restune_diffusion.hooks.manager import TunerManager
from restune_diffusion.imaging.conditions import condition_to_tensor, palette
from restune_diffusion.storage.tuner_file import load_tuner, read_info
from restune_diffusion.training import TrainConfig, ValidationConfig, train
from restune_diffusion.training.latents.batches import Batches
from restune_diffusion.training.latents.cache import Cache, build_cache
from restune_diffusion.training.losses.objective import Objective
from restune_diffusion.tuners.configs import ControlConfig
from restune_diffusion.tuners.tuner import Tuner
from restune_diffusion.utils.errors import DataError

from ...tiny_training import COLORS, draw_image, sd_pipeline, write_images

MakeConfig = Callable[..., TrainConfig]
PALETTE = ControlConfig(conditions=("palette",))


def paired(images: Path, config: ControlConfig, folder: Path | None = None) -> Any:
    source = ConditionSource(config, folder)
    return source, source.paired(find_examples(images, "one for all"), images)


def samples_of(images: Path, config: ControlConfig, folder: Path | None = None, resolution: int = 16) -> list[Any]:
    source, examples = paired(images, config, folder)
    return list(load_samples(examples, resolution, source))


def flat(color: str, size: tuple[int, int] = (24, 20)) -> Image.Image:
    return Image.new("RGB", size, color)


def test_a_condition_is_made_from_the_cropped_image(images: Path) -> None:
    for sample in samples_of(images, PALETTE):
        square = Image.fromarray(((sample.pixels.permute(1, 2, 0) + 1) * 127.5).round().numpy().astype(np.uint8))
        assert torch.equal(sample.conditions[0], condition_to_tensor(palette(square)))
    assert sample.conditions[0].dtype == torch.uint8


def test_a_mask_comes_from_the_alpha_channel(tmp_path: Path) -> None:
    layer = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    layer.paste((255, 255, 255, 255), (4, 4, 12, 12))
    layer.save(tmp_path / "white on nothing.png")
    (sample,) = samples_of(tmp_path, ControlConfig(conditions=("mask",), channels=1))
    assert sample.pixels.eq(1).all()
    assert sample.conditions[0].shape == (1, 16, 16)
    assert sample.conditions[0][0, 4:12, 4:12].eq(255).all()
    assert sample.conditions[0].sum() == 64 * 255


@pytest.mark.parametrize("column", ["condition", "conditions as a list", "conditions by name"])
def test_the_metadata_names_condition_files(tmp_path: Path, column: str) -> None:
    draw_image("red").save(tmp_path / "a.png")
    flat("lime").save(tmp_path / "c.png")
    value = {
        "condition": {"condition": "c.png"},
        "conditions as a list": {"conditions": ["c.png"]},
        "conditions by name": {"conditions": {"palette": "c.png"}},
    }[column]
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a disc", **value}))
    (sample,) = samples_of(tmp_path, PALETTE)
    assert sample.conditions[0].tolist() == [[[value] * 16] * 16 for value in (0, 255, 0)]


def test_a_folder_holds_condition_files_under_the_images_names(tmp_path: Path, images: Path) -> None:
    for name in ("edges", "colours"):
        (tmp_path / "conditions" / name).mkdir(parents=True)
        for color in COLORS:
            flat(color if name == "colours" else "white").save(
                tmp_path / "conditions" / name / f"{color}.webp", lossless=True
            )
    config = ControlConfig(conditions=("edges", "colours"))
    for example, sample in zip(
        find_examples(images), samples_of(images, config, tmp_path / "conditions"), strict=True
    ):
        assert sample.conditions[0].eq(255).all()
        assert torch.equal(sample.conditions[1], condition_to_tensor(flat(example.path.stem, (16, 16))))
    single = samples_of(images, ControlConfig(), tmp_path / "conditions" / "edges")
    assert all(sample.conditions[0].eq(255).all() for sample in single)


def test_image_and_condition_are_cropped_alike(tmp_path: Path) -> None:
    wide = Image.new("RGB", (40, 20), "black")
    wide.paste("white", (15, 0, 40, 20))
    wide.save(tmp_path / "a.png")
    (tmp_path / "c").mkdir()
    wide.resize((80, 40), Image.Resampling.NEAREST).save(tmp_path / "c" / "a.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "images" / "a.png")
    (sample,) = samples_of(tmp_path / "images", ControlConfig(), tmp_path / "c")
    # The edge is at 15 of 40 pixels, which is 4 of 16 in the square.
    for shown in (sample.conditions[0] / 255, (sample.pixels + 1) / 2):
        assert shown[:, :, :2].mean() == pytest.approx(0, abs=0.05)
        assert shown[:, :, 5:].mean() == pytest.approx(1, abs=0.05)


def test_conditions_that_do_not_fit_are_skipped_and_named(
    tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for color in COLORS:
        flat(color).save(tmp_path / f"{color}.png")
    flat("red", (20, 24)).save(tmp_path / "red.png")
    (tmp_path / "blue.png").write_bytes(b"no image")
    samples = samples_of(images, ControlConfig(), tmp_path)
    assert [sample.caption for sample in samples] == [
        f"a {color} disc" for color in COLORS if color not in ("red", "blue")
    ]
    assert "red.png has 20 x 24 pixels, its image 24 x 20" in caplog.text
    assert "blue.png cannot be read as an image" in caplog.text


def test_missing_conditions_are_reported(tmp_path: Path, images: Path) -> None:
    with pytest.raises(DataError, match=r"no images for the condition 'depth'.*canny, palette, blur, mask"):
        paired(images, ControlConfig(conditions=("depth",)))
    with pytest.raises(DataError, match=r"folder of condition images .*gone does not exist"):
        paired(images, PALETTE, tmp_path / "gone")
    flat("red").save(tmp_path / "red.png")
    with pytest.raises(DataError, match=r"green.png has no condition 'palette' in .*, but others have"):
        paired(images, PALETTE, tmp_path)
    inside = tmp_path / "images"
    shutil.copytree(images, inside)
    (inside / "c").mkdir()
    with pytest.raises(DataError, match="lies inside the image folder"):
        paired(inside, PALETTE, inside / "c")
    row = {"file_name": "red.png", "text": "a"}
    for value, message in (("gone.png", "names gone.png, but there is no"), (3, "conditions that are not file names")):
        (inside / "metadata.jsonl").write_text(json.dumps({**row, "condition": value}))
        with pytest.raises(DataError, match=message):
            find_examples(inside)


def test_a_batch_carries_each_images_own_conditions(images: Path) -> None:
    source, examples = paired(images, PALETTE)
    cache = build_cache(sd_pipeline(), load_samples(examples, 16, source))
    batch = batches_of(cache)[3]
    assert batch.conditions[0].shape == (8, 3, 16, 16)
    for states, condition in zip(batch.inputs["encoder_hidden_states"], batch.conditions[0], strict=True):
        (index,) = (i for i in range(len(cache)) if torch.equal(cache.conditioning(i).states, states))
        assert torch.equal(condition, cache.conditions[index][0] / 255)
    plain = build_cache(sd_pipeline(), load_samples(find_examples(images), 16))
    assert batches_of(plain)[3].conditions == ()
    assert torch.equal(batches_of(plain)[3].noise, batch.noise)
    assert plain.data_hash != cache.data_hash
    assert cache.bytes > plain.bytes


def batches_of(cache: Cache, size: int = 8) -> Batches:
    return Batches(
        cache,
        seed=7,
        size=size,
        timesteps=1000,
        caption_dropout=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


@torch.no_grad()
def loss_with(pipeline: Any, cache: Cache, tuner: Tuner, roll: int = 0) -> float:
    """Return the loss on noise not used in training; `roll` gives every image the condition of another."""
    objective = Objective(pipeline.scheduler)
    latents = torch.stack([latent.mean for latent in cache.latents]).repeat(4, 1, 1, 1)
    states = cache.unconditional.states.expand(len(latents), -1, -1)
    conditions = torch.stack([each[0] for each in cache.conditions]).roll(roll, 0).repeat(4, 1, 1, 1) / 255
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(99))
    timesteps = torch.linspace(700, 999, 4).long().repeat_interleave(len(cache))
    with attach(pipeline.unet, tuner):
        manager = TunerManager.of(pipeline.unet)
        assert manager is not None
        manager.set_conditions("default", [conditions])
        prediction = pipeline.unet(objective.add_noise(latents, noise, timesteps), timesteps, states).sample
    return objective.loss(prediction, objective.target(latents, noise, timesteps), timesteps).item()


def distinct_latents_pipeline() -> Any:
    """Return a pipeline with deterministic latents of variance near one, so that the images differ in them."""
    pipeline = sd_pipeline("sample")
    with torch.no_grad():
        pipeline.vae.quant_conv.weight[4:] = 0
        pipeline.vae.quant_conv.bias[4:] = -20
    pipeline.vae.register_to_config(scaling_factor=7.0)
    return pipeline


def test_training_lowers_the_loss_and_learns_what_the_condition_says(config: MakeConfig, images: Path) -> None:
    pipeline = distinct_latents_pipeline()
    settings = config(
        tuner="control",
        control={"conditions": ("palette",)},
        steps=40,
        batch_size=6,
        learning_rate=3e-3,
        caption_dropout=1.0,
    )
    result = train(settings, pipeline=pipeline, verbose=False)
    source, examples = paired(images, PALETTE)
    cache = build_cache(pipeline, load_samples(examples, 16, source))
    tuner = load_tuner(result.path)
    fresh = loss_with(pipeline, cache, Tuner.for_base(pipeline.unet, PALETTE))
    right, wrong = loss_with(pipeline, cache, tuner), loss_with(pipeline, cache, tuner, roll=1)
    assert right < 0.9 * fresh
    # With a random base, most of the loss remains for every condition.
    assert wrong > 1.01 * right


def test_a_broken_run_goes_on_as_if_nothing_had_happened(config: MakeConfig, tmp_path: Path) -> None:
    settings = {"tuner": ("skip", "control"), "control": {"conditions": ("canny", "mask")}, "checkpoint_every": 2}
    whole = train(config(output=tmp_path / "whole", steps=4, **settings), verbose=False)
    train(config(output=tmp_path / "halves", steps=2, **settings), verbose=False)
    halves = train(config(output=tmp_path / "halves", steps=4, resume=True, **settings), verbose=False)
    first, second = load_tuner(whole.path).state_dict(), load_tuner(halves.path).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert {key.split(".")[0] for key in first} == {"skip", "control"}
    assert first["control.encoders.1.levels.11.weight"].any()
    info = read_info(whole.path)
    assert info.training["config"]["tuner"] == ["skip", "control"]
    assert info.training["config"]["control"]["conditions"] == ["canny", "mask"]


def test_a_base_in_bf16_trains_a_control_tuner_in_fp32(config: MakeConfig) -> None:
    settings = config(tuner="control", control={"conditions": ("canny",)}, mixed_precision="bf16", steps=2)
    result = train(settings, verbose=False)
    assert read_info(result.path).dtype == "F32"
    state = load_tuner(result.path).state_dict()
    assert all(value.isfinite().all() for value in state.values())
    assert state["control.encoders.0.levels.11.weight"].any()


def test_samples_use_the_given_control_images(config: MakeConfig, images: Path, capsys: Any) -> None:
    validation = ValidationConfig(
        prompts=("a disc", "a ring"),
        control_images=tuple(images / f"{color}.png" for color in ("red", "blue")),
        steps=1,
    )
    settings = config(tuner="control", control={"conditions": ("palette",)}, steps=1, validation=validation)
    result = train(settings)
    assert "control     palette (made from the images)" in capsys.readouterr().out
    sheet = Image.open(result.samples[-1] / "sheet.png").convert("RGB")
    # The sheet shows the condition next to the sample, so it contains the disc's color.
    assert {(255, 0, 0), (0, 0, 255)} <= {color for _, color in sheet.getcolors(1 << 20)}
    assert str(images.parent) not in json.dumps(read_info(result.path).training)


def test_settings_that_do_not_go_together_are_refused() -> None:
    def make(**changes: Any) -> TrainConfig:
        return TrainConfig(base="b", data=Path("d"), output=Path("o"), **changes)

    with pytest.raises(ValueError, match="validation prompts need 2 control images"):
        make(tuner="control", control={"conditions": ("a", "b")}, validation={"prompts": ("p",)})
    with pytest.raises(ValueError, match="need 0 control images"):
        make(validation={"prompts": ("p",), "control_images": ("x.png",)})
    with pytest.raises(ValueError, match="control_data is given, but the tuner to train is not a control tuner"):
        make(control_data="c")
    with pytest.raises(ValueError, match="each once"):
        make(tuner=("skip", "skip"))
    with pytest.raises(ValueError, match="settings of the control tuner are given, but the tuner to train is skip"):
        make(control={"ratio": 0.5})
    assert make(tuner=("skip", "control")).parts == (make().skip, make().control)


def test_the_script_trains(script: Any, base: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    process = script(
        "train/train_control.py", "--base", base, "--data", images, "--output", tmp_path / "out",
        "--control.conditions", "canny", "--steps", "2", "--cpu",
    )  # fmt: skip
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert [config.part for config in read_info(tmp_path / "out" / "tuner.safetensors").configs] == ["control"]
