from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from restune_diffusion import TunerFileError, attach, describe_base
from restune_diffusion.conversion import import_tuner
from restune_diffusion.conversion.reading.candidates import weights_file
from restune_diffusion.conversion.reading.peft_settings import (
    HARMLESS,
    LIMITED,
    UNDERSTOOD,
    check_settings,
    pattern_key,
)

from ...conftest import make_inputs, make_unet

TARGETS = ["to_q", "to_v"]
MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def output(model, tuner=None) -> torch.Tensor:
    with torch.no_grad(), contextlib.nullcontext() if tuner is None else attach(model, tuner):
        return model(*make_inputs()).sample


def peft_folder(folder: Path, **settings) -> torch.Tensor:
    """Save an adapter with PEFT, and return the output of a U-Net that PEFT loads it into."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = get_peft_model(make_unet(), LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, **settings))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data += torch.randn(parameter.shape) * 0.3
        model.save_pretrained(folder)
    # PEFT sorts the patterns when it writes them, and the first that matches counts.
    return output(PeftModel.from_pretrained(make_unet(), folder))


@pytest.mark.parametrize("kind", [LoraConfig, LoHaConfig, LoKrConfig])
def test_each_setting_of_peft_is_in_one_class(kind):
    classes = (UNDERSTOOD, HARMLESS, LIMITED.keys())
    for field in dataclasses.fields(kind):
        assert sum(field.name in names for names in classes) == 1, field.name
    settings = json.loads(json.dumps(kind(target_modules=TARGETS).to_dict(), default=list))
    check_settings(settings, "in.safetensors")


@pytest.mark.parametrize("key", [*sorted(LIMITED), "of_a_later_version"])
def test_another_value_of_a_limited_setting_is_refused_by_name(key):
    with pytest.raises(TunerFileError, match=f"setting {key} = |trained with {key} = "):
        check_settings({key: "other"}, "in.safetensors")
    check_settings({key: None}, "in.safetensors")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", 1])
def test_an_initialization_that_changes_the_base_is_refused(init):
    with pytest.raises(TunerFileError, match=f"init_lora_weights = {init!r}, .*path_initial_model_for_weight"):
        check_settings({"init_lora_weights": init}, "in.safetensors")


@pytest.mark.parametrize(
    "settings",
    [
        {
            "alpha_pattern": {r"mid_block.*to_q": 32, r"up_blocks\.\d+.*to_v": 16, r"attn2\.to_[qv]": 12},
            "rank_pattern": {r"^down_blocks.*to_v": 2, "to_q|never": 3},
            "use_rslora": True,
        },
        {"init_lora_weights": "orthogonal", "fan_in_fan_out": True},
    ],
)
def test_an_adapter_of_peft_acts_as_in_peft(unet, tmp_path, settings):
    expected = peft_folder(tmp_path, **settings)
    assert (output(unet) - expected).abs().max() > 0.05
    tuner = import_tuner(tmp_path, describe_base(unet))
    torch.testing.assert_close(output(unet, tuner), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_real_adapter_relative_to_another_base_is_refused(unet, tmp_path, init):
    peft_folder(tmp_path, init_lora_weights=init)
    with pytest.raises(TunerFileError, match=f"init_lora_weights = '{init}'"):
        import_tuner(tmp_path, describe_base(unet))


def test_a_pattern_that_never_ends_or_is_not_valid_is_refused():
    with pytest.raises(TunerFileError, match=r"pattern '\(', which cannot"):
        pattern_key(["("], MODULE, "in.safetensors")
    with pytest.raises(TunerFileError, match="regex timed out"):
        pattern_key([r"(?:(.)|(..))+(?!)"], MODULE, "in.safetensors")


def kohya(unet, alpha: torch.Tensor) -> dict[str, torch.Tensor]:
    name, layer = "lora_unet_" + MODULE.replace(".", "_"), unet.get_submodule(MODULE)
    return {
        f"{name}.lora_down.weight": torch.full((4, layer.in_features), 0.1),
        f"{name}.lora_up.weight": torch.full((layer.out_features, 4), 0.2),
        f"{name}.alpha": alpha,
    }


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_an_integer_alpha_is_the_number(unet, tmp_path, dtype):
    save_file(kohya(unet, torch.tensor(2, dtype=dtype)), tmp_path / "whole.safetensors")
    save_file(kohya(unet, torch.tensor(2.0)), tmp_path / "real.safetensors")
    one, two = (import_tuner(tmp_path / f"{name}.safetensors", describe_base(unet)) for name in ("whole", "real"))
    assert one.configs == two.configs
    assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())
    weight = next(iter(kohya(unet, torch.tensor(2))))
    save_file({**kohya(unet, torch.tensor(2)), weight: torch.ones(4, 32, dtype=dtype)}, tmp_path / "bad.safetensors")
    with pytest.raises(TunerFileError, match=f"`{weight}` as {dtype}"):
        import_tuner(tmp_path / "bad.safetensors", describe_base(unet))


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("bundle_emb.<cat>.clip_l", "a bundled embedding"),
        ("lora_unet_down_blocks_0_attentions_0_norm.w_norm", "a trained normalization"),
        ("lora_unet_down_blocks_0_attentions_0_norm.b_norm", "a trained normalization"),
        ("lora_unet_mid_block_attentions_0_proj_in.on_input", r"\(IA\)\^3"),
        ("base_model.model.mid_block.to_k.ia3_l", r"\(IA\)\^3"),
        ("lora_unet_mid_block_attentions_0_proj_in.oft_blocks", "OFT"),
        ("something.else", "also contains `something.else`"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_leftover_is_named_and_partial_skips_it(unet, tmp_path, caplog, key, kind, dtype):
    tensors = kohya(unet, torch.tensor(2.0))
    save_file({**tensors, key: torch.ones(3, dtype=dtype)}, tmp_path / "in.safetensors")
    with pytest.raises(TunerFileError, match=kind):
        import_tuner(tmp_path / "in.safetensors", describe_base(unet))
    with caplog.at_level(logging.WARNING):
        tuner = import_tuner(tmp_path / "in.safetensors", describe_base(unet), partial=True)
    assert key in caplog.text
    assert len(next(tuner.parts()).loras()) == 1
    assert load_file(tmp_path / "in.safetensors").keys() == {*tensors, key}


LORA, ADAPTER = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        ([f"checkpoint-500/{LORA}", f"checkpoint-1000/{LORA}"], None),
        ([f"default/{ADAPTER}", f"second/{ADAPTER}"], None),
        ([ADAPTER, LORA], None),
        (["a.safetensors", "b.safetensors"], None),
        (["a.safetensors", f"checkpoint-500/{LORA}"], None),
        ([f"unet/{ADAPTER}", f"other/{ADAPTER}"], None),
        ([LORA, f"checkpoint-500/{LORA}"], LORA),
        ([f"text_encoder/{ADAPTER}", f"text_encoder_2/{ADAPTER}", f"unet/{ADAPTER}"], f"unet/{ADAPTER}"),
        ([f"default/{ADAPTER}"], f"default/{ADAPTER}"),
        (["a.safetensors"], "a.safetensors"),
    ],
)
def test_of_several_candidates_none_is_taken_for_its_name(tmp_path, caplog, files, taken):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    if taken:
        assert weights_file(tmp_path) == tmp_path / taken
        assert all(name in caplog.text for name in files if name.startswith("text_encoder"))
        return
    with pytest.raises(TunerFileError, match=f"contains {len(files)} weights files") as raised:
        weights_file(tmp_path)
    assert all(name in str(raised.value) for name in files)
