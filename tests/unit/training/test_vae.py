"""Training and generation with another VAE: recorded, never mixed up, and finite in fp16 where it would overflow."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image

from restune_diffusion import RestuneStableDiffusionXLPipeline, read_info
from restune_diffusion.cli import main
from restune_diffusion.imaging.generation_record import read_record
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.inputs import TrainingInputs, prepared
from restune_diffusion.training.losses.class_images import class_examples
from restune_diffusion.utils.errors import DataError, TrainingError

from ... import tiny_training as tiny

MakeConfig = Callable[..., TrainConfig]


def other_vae(seed: int = 5, scale: float = 1.0, **changes: Any) -> AutoencoderKL:
    """Return a VAE; with a large scale its activations, not its latents and images, are out of fp16's range."""
    torch.manual_seed(seed)
    settings = {name: value for name, value in tiny.autoencoder().config.items() if not name.startswith("_")}
    vae = AutoencoderKL(**{**settings, **changes}).eval()
    for half in (vae.encoder, vae.decoder):
        half.conv_in.weight.data *= scale
    return vae


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vaes")
    other_vae().save_pretrained(folder / "first")
    other_vae(6).save_pretrained(folder / "second")
    other_vae(scaling_factor=0.2).save_pretrained(folder / "scaled")
    return folder


def test_the_vae_is_recorded_where_the_base_is(config: MakeConfig, vaes: Path, tmp_path: Path) -> None:
    chosen = config(vae=str(vaes / "first"), steps=1, validation={"prompts": ("a disc",), "steps": 1})
    result = train(chosen, verbose=False)
    facts = read_info(result.path).training
    assert facts["config"]["vae"] == "first"
    assert len(facts["vae_sha256"]) == 64
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert written["vae"] == str(vaes / "first")
    # The image is that of the other VAE, not of the base's own.
    arguments = ["--base", chosen.base, "--tuner", str(result.path), "--prompt", "a disc", "--steps", "1"]
    arguments += ["--device", "cpu", "--output"]
    with pytest.raises(SystemExit) as exited:
        main(["generate", *arguments, str(tmp_path / "with"), "--vae", str(vaes / "first")])
    assert exited.value.code == 0
    with pytest.raises(SystemExit):
        main(["generate", *arguments, str(tmp_path / "without")])
    (sample,) = (tmp_path / "out" / "samples" / "step-000001").glob("00.png")
    images = [tmp_path / name / "00-seed0.png" for name in ("with", "without")]
    pixels = [np.asarray(Image.open(path)).astype(int) for path in [sample, *images]]
    assert np.array_equal(pixels[0], pixels[1])
    assert np.abs(pixels[1] - pixels[2]).max() > 10
    record, without = read_record(images[0]), read_record(images[1])
    assert record.facts["vae"]["name"] == "first"
    assert len(record.facts["vae"]["sha256"]) == 64
    assert "--vae=first" in record.facts["command"]
    assert f"VAE hash: {record.facts['vae']['sha256'][:10]}, VAE: first" in record.text
    assert "vae" not in without.facts
    assert "--vae" not in without.facts["command"]


@contextmanager
def encoded(config: TrainConfig, pipeline: Any = None) -> Iterator[TrainingInputs]:
    with prepared(config, Accelerator(cpu=True), pipeline) as inputs:
        yield inputs


def test_latents_are_those_of_the_other_vae(config: MakeConfig, vaes: Path) -> None:
    means = []
    for vae in (None, "first", "scaled"):
        with encoded(config(vae=None if vae is None else str(vaes / vae))) as inputs:
            means.append(inputs.cache.latents[0].mean)
    assert not torch.allclose(means[0], means[1], atol=0.01)
    torch.testing.assert_close(means[2], means[1] * (0.2 / 0.18215))


def test_a_feature_cache_of_another_vae_is_not_used(config: MakeConfig, vaes: Path, tmp_path: Path) -> None:
    changes = {"tuner": "bypass", "feature_cache": 1, "feature_cache_dir": tmp_path / "features", "steps": 1}
    weights = {}
    for number, vae in enumerate((None, "first", "second", "scaled", "first")):
        given = None if vae is None else str(vaes / vae)
        result = train(config(**changes, vae=given, output=tmp_path / str(number)), verbose=False)
        weights[number] = result.losses
        # The last run finds the cache of the second.
        assert len(list((tmp_path / "features").iterdir())) == min(number + 1, 4)
    assert weights[4] == weights[1]
    assert len({weights[number] for number in range(4)}) == 4


def test_another_vae_does_not_continue_a_run_or_its_class_images(
    config: MakeConfig, vaes: Path, tmp_path: Path
) -> None:
    first = config(vae=str(vaes / "first"), steps=1, checkpoint_every=1)
    train(first, verbose=False)
    for vae, reason in ((None, "vae = None"), ("second", "vae = second")):
        again = config(vae=None if vae is None else str(vaes / vae), steps=2, checkpoint_every=1, resume=True)
        with pytest.raises(TrainingError, match=f"cannot be resumed with {reason}, because it was made with first"):
            train(again, verbose=False)
    # Another VAE of the same name is told by its weights.
    (tmp_path / "elsewhere").mkdir()
    other_vae(6).save_pretrained(tmp_path / "elsewhere" / "first")
    again = config(vae=str(tmp_path / "elsewhere" / "first"), steps=2, checkpoint_every=1, resume=True)
    with pytest.raises(TrainingError, match="cannot be resumed with VAE weights = "):
        train(again, verbose=False)
    settings = {"preservation": "prior", "class_prompt": "a disc", "num_class_images": 1, "class_data": tmp_path / "c"}
    pipeline = RestuneStableDiffusionXLPipeline(**tiny.sdxl_pipeline().components, add_watermarker=False)
    validation = {"steps": 1}
    class_examples(config(**settings, validation=validation), Accelerator(cpu=True), pipeline, 16)
    with pytest.raises(DataError, match="were generated with vae = None, not first"):
        class_examples(
            config(**settings, validation=validation, vae=str(vaes / "first")), Accelerator(cpu=True), pipeline, 16
        )


def test_a_pipeline_in_memory_keeps_its_vae(config: MakeConfig, vaes: Path) -> None:
    with pytest.raises(TrainingError, match=r"has its own VAE; leave vae out, or set pipeline\.vae"):
        train(config(vae=str(vaes / "first")), pipeline=tiny.sd_pipeline(), verbose=False)


def test_every_command_hands_the_vae_to_the_base(
    config: MakeConfig, vaes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from restune_diffusion import evaluation

    result = train(config(steps=1), verbose=False)
    found = {}

    def evaluate(pipeline: Any, *given: Any, vae: str | None, **options: Any) -> Any:
        found["pipeline"], found["vae"] = pipeline, vae
        return evaluation.Evaluation(rows={}, settings={})

    monkeypatch.setattr(evaluation, "evaluate_tuner", evaluate)
    arguments = ["--base", config().base, "--vae", str(vaes / "first"), "--tuner", str(result.path), "--device", "cpu"]
    with pytest.raises(SystemExit):
        main(["evaluate", *arguments, "--data", str(config().data.folder), "--output", str(tmp_path / "evaluation")])
    key = "decoder.conv_in.weight"
    assert found["vae"] == str(vaes / "first")
    assert torch.equal(found["pipeline"].vae.state_dict()[key], other_vae().state_dict()[key])
    grid = ["--prompt", "a disc", "--steps", "1", "--output", str(tmp_path / "grid.png")]
    with pytest.raises(SystemExit):
        main(["grid", *arguments, *grid])
    assert read_record(tmp_path / "grid.png").facts["vae"]["name"] == "first"


LARGE = 1e5
"""Scale at which the activations of `other_vae` are beyond 65504, and its weights are not."""


def fp16_pipeline(scale: float, **changes: Any) -> Any:
    components = {**tiny.sdxl_pipeline().components, "vae": other_vae(scale=scale, **changes)}
    pipeline = RestuneStableDiffusionXLPipeline(**components, add_watermarker=False).to(torch.float16)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_training_encodes_in_fp32_what_overflows_in_fp16(config: MakeConfig) -> None:
    pipeline = fp16_pipeline(LARGE, force_upcast=True)
    with encoded(config(), pipeline) as inputs:
        found = [latent.mean for latent in inputs.cache.latents]
        assert pipeline.vae.dtype == torch.float16
    reference = fp16_pipeline(LARGE)
    reference.vae.to(torch.float32)
    with encoded(config(), reference) as inputs:
        expected = [latent.mean for latent in inputs.cache.latents]
    for one, two in zip(found, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, two)
    # Without the mark the same VAE overflows, and the message names the remedy.
    with (
        pytest.raises(TrainingError, match=r"overflow in fp16\. Use another VAE with --vae"),
        encoded(config(), fp16_pipeline(LARGE, force_upcast=False)),
    ):
        pass
    result = train(config(steps=1, validation={"prompts": ("a disc",), "steps": 1}), pipeline=pipeline, verbose=False)
    assert math.isfinite(result.losses[0])
    assert np.asarray(Image.open(result.samples[-1] / "00.png")).std() > 1


def test_a_vae_that_is_safe_in_fp16_stays_in_it(config: MakeConfig) -> None:
    pipeline = fp16_pipeline(1.0, force_upcast=False)
    dtypes = set()
    pipeline.vae.encoder.conv_in.register_forward_hook(lambda _, given, result: dtypes.add(result.dtype))
    with encoded(config(), pipeline) as inputs:
        found = inputs.cache.latents[0].mean
    assert dtypes == {torch.float16}
    assert found.dtype == torch.float32
    reference = fp16_pipeline(1.0)
    reference.vae.to(torch.float32)
    with encoded(config(), reference) as inputs:
        expected = inputs.cache.latents[0].mean
    # fp16 has ten bits: 0.001 of values near 1.
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("force_upcast", [True, False])
def test_generate_in_fp16_decodes_what_overflows_in_fp32(tmp_path: Path, force_upcast: bool) -> None:
    tiny.sdxl_pipeline().save_pretrained(tmp_path / "base")
    other_vae(scale=LARGE, force_upcast=force_upcast).save_pretrained(tmp_path / "vae")
    arguments = ["--base", str(tmp_path / "base"), "--vae", str(tmp_path / "vae"), "--prompt", "a disc"]
    arguments += ["--steps", "1", "--device", "cpu", "--dtype", "fp16", "--output", str(tmp_path / "images")]
    with pytest.raises(SystemExit) as exited:
        main(["generate", *arguments])
    assert exited.value.code == 0
    image = np.asarray(Image.open(tmp_path / "images" / "00-seed0.png")).astype(int)
    pipeline = RestuneStableDiffusionXLPipeline.from_pretrained(tmp_path / "base", torch_dtype=torch.float16)
    generator = torch.Generator("cpu").manual_seed(0)
    latents = pipeline("a disc", num_inference_steps=1, generator=generator, guidance_scale=7.5, output_type="latent")
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae", torch_dtype=torch.float16).float()
    with torch.no_grad():
        decoded = vae.decode(latents.images.float() / vae.config.scaling_factor).sample
    expected = pipeline.image_processor.postprocess(decoded, output_type="np")[0] * 255
    if force_upcast:
        assert expected.std() > 5
        assert np.abs(image - expected).max() <= 1.5
    else:
        # A black image shows that the values are out of range.
        assert image.max() == 0
    record = json.loads(json.dumps(read_record(tmp_path / "images" / "00-seed0.png").facts))
    assert record["dtype"] == "float16"
