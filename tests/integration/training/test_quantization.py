"""Base with linear layers quantized to 8 bits by torchao, and tuners trained on it in fp32."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from restune_diffusion import ResConfig, RestuneError, RestuneStableDiffusionPipeline, Tuner, attach, merge_lora
from restune_diffusion.pipelines.load_base import load_base
from restune_diffusion.storage.tuner_file import read_info
from restune_diffusion.training import TrainConfig, train
from restune_diffusion.training.feature_cache.cache import models_hash
from restune_diffusion.training.quantization import parameter_bytes, quantize_base, stored_tensors
from restune_diffusion.utils.errors import TrainingError

from ... import tiny_training as tiny
from ...conftest import make_inputs, make_unet, randomize
from ...unit.training.test_train import assert_same

MakeConfig = Callable[..., TrainConfig]
PEERS = Path(__file__).parents[3] / "build" / "peers"
LORA = ResConfig(self_attention="lora", cross_attention="lora", feed_forward="lora", width=2)


@pytest.fixture
def torchao() -> Iterator[None]:
    """Make torchao importable from the folder of `make peers` during a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(PEERS)])
        pytest.importorskip("torchao", reason="run make peers")
        yield


@pytest.fixture
def quantized(torchao: None) -> Any:
    unet = make_unet()
    quantize_base(unet)
    return unet


def test_linear_layers_take_a_byte_for_each_weight(quantized: Any) -> None:
    plain = make_unet()
    linears = [module for module in plain.modules() if isinstance(module, nn.Linear)]
    weights, rows = (sum(each) for each in zip(*((m.weight.numel(), m.out_features) for m in linears), strict=True))
    saved = parameter_bytes(plain) - parameter_bytes(quantized)
    # fp32 to int8, plus a scale and a zero point for each output channel.
    assert saved == 3 * weights - 5 * rows
    assert parameter_bytes(plain) == 4 * sum(each.numel() for each in plain.parameters())
    with torch.no_grad():
        before, after = (unet(*make_inputs()).sample for unet in (plain, quantized))
    assert 0 < (before - after).norm() < 0.05 * before.norm()


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_quantized_layer_and_its_gradient_are_those_of_its_dequantized_weight(
    dtype: torch.dtype, tolerance: float
) -> None:
    layers = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8, bias=False)).to(dtype).requires_grad_(False)
    quantize_base(layers)
    plain = copy.deepcopy(layers)
    for number in (0, 2):
        # The weight as it is stored, in a layer of torch.
        plain[number].__class__ = nn.Linear
        plain[number].weight = nn.Parameter(layers[number].weight.dequantize(), requires_grad=False)
    x, other = (torch.randn(2, 5, 24, dtype=dtype).requires_grad_() for _ in range(2))
    other.data.copy_(x.data)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        found = layers(x)
    expected = plain(other)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(found)
    found.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, other.grad, rtol=tolerance, atol=tolerance)
    assert torch.Size([24, 40]) not in kept
    assert all(parameter.grad is None for parameter in layers.parameters())


@pytest.mark.parametrize(
    "part",
    [{"tuner": "skip"}, {"tuner": "bypass"}, {"tuner": "res", "res": LORA},
     {"tuner": "res", "res": ResConfig(self_attention="prefix", cross_attention="prompt", block="adapter")}],
    ids=["skip", "bypass", "lora", "prefix, prompt and adapter"],
)  # fmt: skip
@pytest.mark.usefixtures("torchao")
def test_a_tuner_learns_in_fp32_and_acts_on_the_base_in_full(config: MakeConfig, part: dict[str, Any]) -> None:
    runs = []
    for rate in (1e-12, 1e-2):
        settings = config(**part, base_quantization="int8", steps=12, batch_size=3, learning_rate=rate,
                               output=config().output / str(rate))  # fmt: skip
        runs.append(train(settings, verbose=False))
    idle, trained = runs
    assert trained.losses[0] == idle.losses[0], "the same draws"
    assert sum(trained.losses[-4:]) < 0.98 * sum(idle.losses[-4:])
    info = read_info(trained.path)
    assert info.dtype == "F32"
    assert info.training["config"]["base_quantization"] == "int8"
    pipe = load_base(settings.base, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    plain = generate(pipe)
    pipe.load_tuner_weights(trained.path)
    assert (generate(pipe) - plain).abs().max() > 1e-3


def generate(pipe: RestuneStableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipe("a disc", num_inference_steps=2, generator=generator, output_type="np").images)


@pytest.mark.usefixtures("torchao")
def test_resuming_changes_nothing_and_samples_are_generated(config: MakeConfig, tmp_path: Path) -> None:
    common = {"base_quantization": "int8", "validation": {"prompts": ["a disc"], "steps": 1}}
    whole = train(config(output=tmp_path / "whole", steps=3, **common), verbose=False)
    part = config(output=tmp_path / "part", steps=2, checkpoint_every=2, **common)
    assert len(train(part, verbose=False).samples) == 2
    resumed = train(part.model_copy(update={"steps": 3, "resume": True}), verbose=False)
    assert_same(whole.path, resumed.path)
    unquantized = part.model_copy(update={"steps": 3, "resume": True, "base_quantization": None})
    with pytest.raises(TrainingError, match="cannot be resumed with base_quantization = None"):
        train(unquantized, verbose=False)


def test_lora_beside_a_quantized_layer_adds_what_it_adds_beside_a_plain_one(quantized: Any) -> None:
    tuner = Tuner.for_base(quantized, LORA)
    randomize(tuner)
    site, lora = next(iter(next(iter(tuner.parts())).loras().items()))  # type: ignore[attr-defined]
    layer = quantized.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
    assert site.startswith("down.0.attn.0.block.0.self"), site
    seen: list[torch.Tensor] = []
    x = torch.randn(1, 4, layer.in_features)
    alone = layer(x)
    with attach(quantized, tuner):
        handle = layer.register_forward_hook(lambda _, args, output: seen.extend([args[0], output]))
        quantized(*make_inputs())
        handle.remove()
    assert torch.equal(layer(x), alone), "nothing is left behind"
    assert seen[1].requires_grad
    with torch.no_grad():
        torch.testing.assert_close(seen[1], layer(seen[0]) + lora(seen[0]))


def test_lora_does_not_merge_into_quantized_weights(quantized: Any) -> None:
    tuner = Tuner.for_base(quantized, LORA)
    with pytest.raises(RestuneError, match=r"is quantized \(Int8Tensor\) and cannot be changed; attach the tuner"):
        merge_lora(quantized, tuner)


def test_what_cannot_be_is_refused(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="A pipeline passed as an argument is not quantized"):
        train(config(base_quantization="int8"), pipeline=tiny.sd_pipeline(), verbose=False)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(TrainingError, match=r"needs torchao; run pip install 'restune-diffusion\[quantization\]'"):
        quantize_base(nn.Linear(2, 2))


def test_the_hash_of_a_quantized_base_tells_its_weights(quantized: Any) -> None:
    before = models_hash([quantized])
    assert before == models_hash([quantized]) != models_hash([make_unet()])
    weight = quantized.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q").weight
    *_, part = stored_tensors(weight.detach())
    part.view(-1)[0] += 1
    assert models_hash([quantized]) != before


@pytest.mark.usefixtures("torchao")
def test_a_bypass_trains_from_the_features_of_a_quantized_base(config: MakeConfig, tmp_path: Path) -> None:
    common = {"tuner": "bypass", "feature_cache": 1, "feature_cache_dir": tmp_path / "banks", "steps": 2}
    plain = train(config(output=tmp_path / "plain", **common), verbose=False)
    quantized_run = train(config(output=tmp_path / "int8", base_quantization="int8", **common), verbose=False)
    assert len(list((tmp_path / "banks").iterdir())) == 2
    assert plain.losses != quantized_run.losses
    assert plain.losses == pytest.approx(quantized_run.losses, rel=0.1)
