from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from restune_diffusion.storage.tuner_file import load_tuner
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training import inputs as inputs
from restune_diffusion.training.callbacks.validation import generate_samples
from restune_diffusion.training.memory import gradient_checkpointing
from restune_diffusion.training.optimization.averaging import TunerAverage
from restune_diffusion.tuners.configs import BypassConfig, ResConfig, SkipConfig
from restune_diffusion.utils.errors import TrainingError

from ...tiny_training import sd_pipeline

MakeConfig = Callable[..., TrainConfig]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_tuner(path).state_dict())


def test_the_average_is_the_one_worked_out_by_hand() -> None:
    """Shares kept: 0, 2/11, 3/12 ... of diffusers' warm-up (1 + n) / (10 + n), and at most the decay."""
    module = torch.nn.Linear(1, 1, bias=False)
    average = TunerAverage(module, decay=0.2)
    expected = 0.0
    for value, share in [(1.0, 0.0), (2.0, 2 / 11), (4.0, 0.2), (8.0, 0.2)]:
        with torch.no_grad():
            module.weight.fill_(value)
        average.update()
        expected = share * expected + (1 - share) * value
    with average.applied():
        assert module.weight.item() == pytest.approx(expected, rel=1e-6)
    assert module.weight.item() == 8.0, "the tuner has its own weights back"


def test_the_file_and_the_samples_have_the_average(config: MakeConfig) -> None:
    settings = config(steps=4, checkpoint_every=1, checkpoints_kept=9, ema_decay=0.999,
                      validation={"prompts": ["a red disc"], "steps": 2, "every": 3})  # fmt: skip
    result = train(settings, verbose=False)
    states = [tensors(settings.output / f"checkpoint-{step:06d}" / "tuner.safetensors") for step in (1, 2, 3, 4)]
    for name, value in tensors(result.path).items():
        average = states[0][name].double()
        for number, state in enumerate(states[1:], start=1):
            share = (1 + number) / (10 + number)
            average = share * average + (1 - share) * state[name]
        torch.testing.assert_close(value.double(), average, rtol=1e-4, atol=1e-7)
    assert any(not torch.equal(value, states[-1][name]) for name, value in tensors(result.path).items())

    shown = Image.open(next(result.samples[-1].glob("0*.png")))
    pipeline = inputs.load_base(settings.base, torch.float32)
    (drawn,) = generate_samples(pipeline, result.path, settings.validation, torch.device("cpu"))
    assert drawn.tobytes() == shown.convert("RGB").tobytes()


def gradients(config: MakeConfig, tmp_path: Path, kind: str, wanted: bool) -> dict[str, torch.Tensor]:
    part = {"skip": SkipConfig(), "bypass": BypassConfig(), "res": ResConfig()}[kind]
    name = f"{kind}-{wanted}"
    made = config(output=tmp_path / name, steps=3, tuner=kind, gradient_checkpointing=wanted, **{kind: part})
    return tensors(train(made, verbose=False).path)


@pytest.mark.parametrize("kind", ["skip", "bypass", "res"])
def test_gradient_checkpointing_changes_no_result(config: MakeConfig, tmp_path: Path, kind: str) -> None:
    kept, again = (gradients(config, tmp_path, kind, wanted) for wanted in (False, True))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_gradient_checkpointing_computes_blocks_again_and_is_taken_off() -> None:
    unet = sd_pipeline().unet.eval()
    calls = []
    # before the block: the second time it stops as soon as the last tensor is there
    unet.up_blocks[1].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    inputs = (torch.randn(1, 4, 8, 8, requires_grad=True), torch.tensor([5]), torch.randn(1, 3, 32))
    before = [dict(module.__dict__) for module in unet.modules()]
    with gradient_checkpointing(unet, True):
        unet(*inputs).sample.sum().backward()
        assert len(calls) == 2
    unet(*inputs).sample.sum().backward()
    assert len(calls) == 3
    after = [module.__dict__ for module in unet.modules()]
    assert [own.keys() for own in after] == [own.keys() for own in before]
    assert not any(own.get("gradient_checkpointing") for own in after)


def test_dropped_encoders_are_gone_while_the_tuner_trains(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Any]] = []

    def load(*arguments: Any) -> Any:
        pipeline = load_base(*arguments)
        held.extend(weakref.ref(part) for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet))
        held.append(weakref.ref(next(pipeline.vae.parameters())))
        return pipeline

    load_base = inputs.load_base
    monkeypatch.setattr(inputs, "load_base", load)
    alive: list[list[bool]] = []

    def look(_: Any) -> None:
        gc.collect()
        alive.append([each() is not None for each in held])

    result = train(config(steps=1, drop_encoders=True), verbose=False, on_progress=look)
    assert alive == [[False, False, True, False]]
    held.clear()
    kept = train(config(steps=1, output=result.path.parent.with_name("kept")), verbose=False, on_progress=look)
    assert alive[1] == [True, True, True, True]
    assert all(torch.equal(value, tensors(kept.path)[name]) for name, value in tensors(result.path).items())


def test_encoders_of_a_pipeline_in_use_are_not_dropped(config: MakeConfig) -> None:
    with pytest.raises(TrainingError, match="cannot be dropped"):
        train(config(drop_encoders=True), pipeline=sd_pipeline(), verbose=False)


def test_samples_are_drawn_with_the_schedule_that_was_trained(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from restune_diffusion.training.callbacks import validation

    seen: list[Any] = []
    make = validation.sampling_pipeline

    def spy(*arguments: Any) -> Any:
        sampler = make(*arguments)
        seen.append(sampler.scheduler)
        return sampler

    monkeypatch.setattr(validation, "sampling_pipeline", spy)
    made = config(steps=1, prediction_type="v_prediction", rescale_betas_zero_snr=True,
                  validation={"prompts": ["a red disc"], "steps": 2})  # fmt: skip
    train(made, verbose=False)
    assert seen[-1].config.prediction_type == "v_prediction"
    assert seen[-1].alphas_cumprod[-1] < 1e-6
    assert seen[-1].config.timestep_spacing == "trailing"
