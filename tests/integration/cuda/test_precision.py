"""Full-size bases in half precision: dtypes, kernels and kept bytes of a training step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from restune_diffusion import BypassConfig, ControlConfig, ResConfig, SkipConfig, Tuner
from restune_diffusion.backbones import describe_base
from restune_diffusion.pipelines.load_base import PRECISIONS
from restune_diffusion.training.feature_cache.shared_pass import features_of
from restune_diffusion.training.quantization import quantize_base

from .fakes import counted, fake_cuda, make_base, make_batch, make_run, training_step, weight_bytes

PEERS = Path(__file__).parents[3] / "build" / "peers"
LORA = ResConfig(self_attention="lora", cross_attention="lora", feed_forward=None, width=16)
ATTENTION = ResConfig(self_attention="attention", cross_attention="attention", feed_forward=None)
EXACT = ResConfig(self_attention="prefix", cross_attention="prompt", feed_forward=None, gate="exact")
NORMS = ("native_group_norm", "native_layer_norm")


@pytest.fixture
def torchao() -> Iterator[None]:
    """Make torchao importable from the folder of `make peers` during a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(PEERS)])
        pytest.importorskip("torchao", reason="run make peers")
        yield


def plain_pass(unet: Any) -> Any:
    """Count of a forward pass of the base alone, without autocast."""
    batch = make_batch(unet)
    return counted(lambda: unet(batch.latents.to(unet.dtype), batch.timesteps, return_dict=False, **batch.inputs))


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL"])
def test_a_shared_pass_is_that_of_the_base_alone(name: str) -> None:
    with fake_cuda():
        unet = make_base(name, torch.float16)
        with torch.device("cuda"):
            tuner = Tuner((BypassConfig(),), describe_base(unet))
        run, batch = make_run(unet, tuner, "fp16"), make_batch(unet)
        plain, shared = plain_pass(unet), counted(lambda: features_of(run, ("skip.0",), batch))
    # The noise is added to the latents before.
    assert shared.kernels == plain.kernels + 1
    for norm in NORMS:
        assert set(shared.dtypes[norm]) == {torch.float16}


@pytest.mark.parametrize(
    ("part", "precision"),
    [
        (SkipConfig(), "fp16"),
        (SkipConfig(), "bf16"),
        (LORA, "fp16"),
        (EXACT, "fp16"),
        (ControlConfig(conditions=("edges",)), "fp16"),
    ],
    ids=["skip", "skip in bf16", "lora", "exact", "control"],
)
def test_norms_of_the_base_and_products_of_the_tuner_run_in_its_dtype(part: Any, precision: str) -> None:
    dtype = PRECISIONS[precision]
    with fake_cuda():
        step = training_step(make_base("SD 1.5", dtype), (part,), precision)
    for norm in NORMS:
        assert set(step.forward.dtypes[norm]) == {dtype}
        assert set(step.backward.dtypes[f"{norm}_backward"]) == {dtype}
    products = [step.forward.dtypes.get(product, {}) for product in ("mm", "addmm", "convolution")]
    assert {each for dtypes in products for each in dtypes} == {dtype}


def test_a_lora_adds_at_most_six_kernels_to_a_layer() -> None:
    with fake_cuda():
        unet = make_base("SD 1.5", torch.float16)
        plain, step = plain_pass(unet), training_step(unet, (LORA,))
        layers = len(Tuner.empty((LORA,), describe_base(unet)).res.writes)
    # Casts of both weights, two products, the factor, and the sum; and the noise is added to the latents.
    assert plain.kernels + 4 * layers < step.forward.kernels <= plain.kernels + 6 * layers + 1


def test_without_half_precision_everything_runs_in_fp32() -> None:
    with fake_cuda():
        step = training_step(make_base("SD 1.5", torch.float32), (SkipConfig(),), "no")
    for count in (step.forward, step.backward):
        found = {dtype for dtypes in count.dtypes.values() for dtype in dtypes if dtype.is_floating_point}
        assert found == {torch.float32}


def test_a_pipeline_in_fp32_runs_in_half_precision_if_it_is_asked_for() -> None:
    with fake_cuda():
        step = training_step(make_base("SD 1.5", torch.float32), (SkipConfig(),), "bf16")
    assert set(step.forward.dtypes["convolution"]) == {torch.bfloat16}


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize(("name", "part"), [("SD 1.5", LORA), ("SDXL", SkipConfig())], ids=["lora", "SDXL, skip"])
def test_an_int8_base_keeps_for_backward_what_one_in_bf16_keeps(name: str, part: Any) -> None:
    kept, weights = [], []
    for quantized in (False, True):
        with fake_cuda():
            unet = make_base(name, torch.bfloat16)
            if quantized:
                quantize_base(unet)
            kept.append(training_step(unet, (part,), "bf16").kept)
            weights.append(weight_bytes(unet))
    assert kept[1] == kept[0] > 0
    assert weights[1] < 0.9 * weights[0]


@pytest.mark.parametrize("precision", ["no", "fp16"])
@pytest.mark.parametrize("part", [ATTENTION, EXACT], ids=["attention", "exact"])
def test_no_tuner_stores_the_scores_of_its_attention(part: Any, precision: str) -> None:
    with fake_cuda() as attention:
        # Heads of one channel at the deepest level; one transformer layer a block has them as well as ten.
        unet = make_base("SDXL", PRECISIONS[precision], transformer_layers_per_block=1)
        training_step(unet, (part,), precision)
    assert attention.chosen["scores"] == 0
    assert attention.chosen["flash" if precision == "fp16" else "memory-efficient"] > 0
