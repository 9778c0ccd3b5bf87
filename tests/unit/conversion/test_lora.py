from __future__ import annotations

import contextlib
import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from restune_diffusion import (
    ResConfig,
    SkipConfig,
    Tuner,
    TunerFileError,
    attach,
    describe_base,
    load_tuner,
    save_tuner,
)
from restune_diffusion.backbones import module_path
from restune_diffusion.conversion import export_tuner, import_tuner
from restune_diffusion.conversion.names import sgm_path

from ...conftest import make_inputs, make_unet, randomize

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [*ATTENTION, "ff.net.0.proj", "ff.net.2"]
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 32, 64),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (4, 4, 8),
    "use_linear_projection": True,
}


@pytest.fixture
def base(unet):
    return describe_base(unet)


def output(unet: UNet2DConditionModel, tuner: Tuner | None = None) -> torch.Tensor:
    with torch.no_grad(), contextlib.nullcontext() if tuner is None else attach(unet, tuner):
        return unet(*make_inputs()).sample


def linear_modules(unet: UNet2DConditionModel, targets: list[str]) -> list[str]:
    """Paths of the layers that LoRA's customary targets name."""
    return [
        name
        for name, module in unet.named_modules()
        if ".transformer_blocks." in name and isinstance(module, torch.nn.Linear) and name.endswith(tuple(targets))
    ]


def kohya_tensors(
    unet: UNet2DConditionModel,
    modules: list[str],
    ranks: dict[str, int] | None = None,
    alpha: float = 4.0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """A LoRA as sd-scripts saves it; alpha 8 wherever the rank is not 4."""
    generator = torch.Generator().manual_seed(11)
    tensors = {}
    for module in modules:
        layer, rank = unet.get_submodule(module), (ranks or {}).get(module, 4)
        name = "lora_unet_" + module.replace(".", "_")
        tensors |= {
            f"{name}.lora_down.weight": torch.randn(rank, layer.in_features, generator=generator) * 0.3,
            f"{name}.lora_up.weight": torch.randn(layer.out_features, rank, generator=generator) * 0.3,
            f"{name}.alpha": torch.tensor(alpha if rank == 4 else 8.0),
        }
    return {key: value.to(dtype) for key, value in tensors.items()}


def in_diffusers(unet: UNet2DConditionModel, file: Path, kind=StableDiffusionPipeline) -> torch.Tensor:
    """Load the file as the pipelines of diffusers do, and draw."""
    state, alphas, metadata = kind.lora_state_dict(str(file), unet_config=unet.config, return_lora_metadata=True)
    kind.load_lora_into_unet(state, alphas, unet, adapter_name="a", metadata=metadata)
    result = output(unet)
    unet.delete_adapters("a")
    return result


def by_hand(unet: UNet2DConditionModel, file: Path) -> torch.Tensor:
    """Add what each layer of a kohya file adds, `alpha / rank * up @ down`, to the weights, and draw."""
    tensors, changed = load_file(file), copy.deepcopy(unet)
    modules = {f"lora_unet_{path}".replace(".", "_"): path for path in linear_modules(unet, EVERYTHING)}
    for name in dict.fromkeys(key.split(".")[0] for key in tensors):
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        weight = changed.get_submodule(modules[name]).weight
        weight.data += tensors[f"{name}.alpha"].item() / down.shape[0] * (up @ down)
    return output(changed)


def assert_same_tensors(one: Path, two: Path) -> None:
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype, key
        assert torch.equal(value, second[key]), key


def uneven(unet: UNet2DConditionModel) -> tuple[list[str], dict[str, int]]:
    """Layers chosen without order, of three ranks."""
    modules = linear_modules(unet, EVERYTHING)[::3] + linear_modules(unet, ["to_v"])[1::4]
    modules = list(dict.fromkeys(modules))
    return modules, {module: (4, 8, 3)[number % 3] for number, module in enumerate(modules)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [4.0, 1.0, 3.0])
def test_a_kohya_file_comes_back_bit_for_bit(unet, base, tmp_path, alpha, dtype):
    save_file(
        kohya_tensors(unet, linear_modules(unet, ATTENTION), alpha=alpha, dtype=dtype), tmp_path / "in.safetensors"
    )
    tuner = import_tuner(tmp_path / "in.safetensors", base)
    assert tuner.dtype == dtype
    (config,) = tuner.configs
    assert config == ResConfig(
        self_attention="lora", cross_attention="lora", feed_forward=None, width=4,
        alpha=None if alpha == 4 else alpha, linears=tuple(sorted(ATTENTION)),
    )  # fmt: skip
    save_tuner(tuner, tmp_path / "ours.safetensors")
    export_tuner(load_tuner(tmp_path / "ours.safetensors"), tmp_path / "out.safetensors", "kohya")
    assert_same_tensors(tmp_path / "in.safetensors", tmp_path / "out.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layers_of_different_ranks_and_factors_come_back_bit_for_bit(unet, base, tmp_path, dtype):
    modules, ranks = uneven(unet)
    tensors = kohya_tensors(unet, modules, ranks, dtype=dtype)
    for key, value in tensors.items():
        if dtype == torch.float32 and key.endswith(".alpha"):
            # In fp32 only factors that differ by powers of two come out of `up` as they went in.
            rank = tensors[key.replace(".alpha", ".lora_down.weight")].shape[0]
            value.fill_(rank / 2 if rank == 8 else rank)
    save_file(tensors, tmp_path / "in.safetensors")
    save_tuner(import_tuner(tmp_path / "in.safetensors", base), tmp_path / "ours.safetensors")
    export_tuner(load_tuner(tmp_path / "ours.safetensors"), tmp_path / "out.safetensors", "kohya")
    assert_same_tensors(tmp_path / "in.safetensors", tmp_path / "out.safetensors")


def test_a_kohya_file_with_an_alpha_for_each_layer_acts_as_the_equation_says(unet, base, tmp_path):
    # diffusers 0.42.1 cannot serve as the oracle: it ignores the alphas of attention layers that differ from the rest.
    modules, ranks = uneven(unet)
    save_file(kohya_tensors(unet, modules, ranks, 1.5), tmp_path / "in.safetensors")
    expected = by_hand(unet, tmp_path / "in.safetensors")
    assert (output(unet) - expected).abs().max() > 0.05
    torch.testing.assert_close(
        output(unet, import_tuner(tmp_path / "in.safetensors", base)), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("ranks", [None, {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 9}])
def test_a_kohya_file_acts_as_in_diffusers(unet, base, tmp_path, ranks):
    tensors = kohya_tensors(unet, linear_modules(unet, EVERYTHING)[::2], ranks, 2.0)
    tensors = {key: torch.tensor(2.0) if key.endswith("alpha") else value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "in.safetensors")
    plain, expected = output(unet), in_diffusers(make_unet(), tmp_path / "in.safetensors")
    assert (plain - expected).abs().max() > 0.05
    torch.testing.assert_close(
        output(unet, import_tuner(tmp_path / "in.safetensors", base)), expected, rtol=0, atol=1e-5
    )


def test_the_public_pipeline_of_diffusers_agrees(components, tmp_path):
    pipe = StableDiffusionPipeline(**components, requires_safety_checker=False)
    modules = linear_modules(pipe.unet, EVERYTHING)[::5]
    save_file(kohya_tensors(pipe.unet, modules, alpha=2.0), tmp_path / "in.safetensors")
    tuner = import_tuner(tmp_path / "in.safetensors", describe_base(pipe.unet))
    size, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    latent, time = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(1)), torch.tensor(321)
    text = torch.randn(1, 5, pipe.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = pipe.unet(latent, time, text).sample
        pipe.load_lora_weights(tmp_path / "in.safetensors")
        expected = pipe.unet(latent, time, text).sample
        pipe.unload_lora_weights()
        with attach(pipe.unet, tuner):
            ours = pipe.unet(latent, time, text).sample
    assert (plain - expected).abs().max() > 0.05
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"lora_alpha": 2}, {"lora_alpha": 6, "use_rslora": True},
                                     {"rank_pattern": {"attn1.to_q": 8},
                                      "alpha_pattern": {"attn1.to_q": 16}}])  # fmt: skip
def test_what_diffusers_trained_and_saved_acts_here_as_there(unet, base, tmp_path, changes):
    trained = make_unet()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_v", "ff.net.2"], **changes}
        trained.add_adapter(LoraConfig(init_lora_weights=False, **config))
    settings = trained.peft_config["default"].to_dict()
    settings["target_modules"] = list(settings["target_modules"])
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(trained), unet_lora_adapter_metadata=settings
    )
    expected = output(trained)
    assert (output(unet) - expected).abs().max() > 0.01
    tuner = import_tuner(tmp_path, base)
    torch.testing.assert_close(output(unet, tuner), expected, rtol=0, atol=1e-5)
    export_tuner(tuner, tmp_path / "out.safetensors", "diffusers")
    assert_same_tensors(tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "out.safetensors")
    torch.testing.assert_close(in_diffusers(make_unet(), tmp_path / "out.safetensors"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("alpha", [None, 2.5])
def test_a_tuner_of_ours_acts_in_diffusers_as_here_and_comes_back(unet, base, tmp_path, layout, alpha):
    config = ResConfig(block="lora", self_attention=None, feed_forward=None, width=3, alpha=alpha, sites=("up.*",))
    tuner = Tuner.for_base(unet, config)
    randomize(tuner, std=0.3)
    export_tuner(tuner, tmp_path / "out.safetensors", layout)
    torch.testing.assert_close(
        in_diffusers(make_unet(), tmp_path / "out.safetensors"), output(unet, tuner), rtol=0, atol=1e-5
    )
    back = import_tuner(tmp_path / "out.safetensors", base).state_dict()
    assert back.keys() == tuner.state_dict().keys()
    assert all(torch.equal(value, back[key]) for key, value in tuner.state_dict().items())


def test_a_lora_that_scepter_trained_through_ms_swift(unet, base, tmp_path):
    kohya = kohya_tensors(unet, linear_modules(unet, ATTENTION), alpha=2.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    expected = import_tuner(tmp_path / "kohya.safetensors", base).state_dict()
    tensors = {}
    for module in linear_modules(unet, ATTENTION):
        for half, letter in (("down", "A"), ("up", "B")):
            name = f"model.{sgm_path(module, 2)}.lora_{letter}.0_SwiftLoRA.weight"
            tensors[name] = kohya[f"lora_unet_{module}".replace(".", "_") + f".lora_{half}.weight"]
    assert "model.output_blocks.3.1.transformer_blocks.0.attn2.to_out.0.lora_B.0_SwiftLoRA.weight" in tensors
    folder = tmp_path / "scepter" / "0_SwiftLoRA"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"swift_type": "LORA", "r": 4, "lora_alpha": 2, "bias": "none", "use_dora": False, "alpha_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    state = import_tuner(tmp_path / "scepter", base).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "use_merged_linear": True}))
    with pytest.raises(TunerFileError, match="use_merged_linear = True"):
        import_tuner(tmp_path / "scepter", base)


def test_names_of_the_original_unet_in_files_for_xl(tmp_path):
    unet = make_unet(**XL)
    base = describe_base(unet)
    tuner = Tuner.for_base(unet, ResConfig(block="lora", self_attention=None, feed_forward=None, width=2))
    randomize(tuner, std=0.3)
    export_tuner(tuner, tmp_path / "out.safetensors", "kohya")
    names = {key.split(".")[0] for key in load_file(tmp_path / "out.safetensors")}
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in names
    assert "lora_unet_middle_block_1_transformer_blocks_1_ff_net_0_proj" in names
    assert "lora_unet_output_blocks_5_1_transformer_blocks_0_attn2_to_out_0" in names
    expected = in_diffusers(make_unet(**XL), tmp_path / "out.safetensors", StableDiffusionXLPipeline)
    assert (output(unet) - expected).abs().max() > 0.01
    torch.testing.assert_close(output(unet, tuner), expected, rtol=0, atol=1e-5)
    back = import_tuner(tmp_path / "out.safetensors", base).state_dict()
    assert all(torch.equal(value, back[key]) for key, value in tuner.state_dict().items())
    # Both namings are read.
    tensors = {}
    for site, lora in next(tuner.parts()).loras().items():
        name = f"lora_unet_{module_path(site)}".replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = lora.down.weight.detach().clone()
        tensors[f"{name}.lora_up.weight"] = lora.up.weight.detach().clone()
    save_file(tensors, tmp_path / "named.safetensors")
    again = import_tuner(tmp_path / "named.safetensors", base).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in tuner.state_dict().items())


def test_what_the_base_lacks_or_no_tuner_changes(unet, base, tmp_path, caplog):
    tensors = kohya_tensors(unet, linear_modules(unet, ["attn2.to_k"]))
    inside = len(tensors) // 3
    for name, shape in {"lora_te_text_model_encoder_layers_0_mlp_fc1": (8, 8),
                        "lora_unet_class_embedding_linear_1": (32, 32)}.items():  # fmt: skip
        tensors[f"{name}.lora_down.weight"] = torch.ones(4, *shape[1:])
        tensors[f"{name}.lora_up.weight"] = torch.ones(shape[0], 4, *shape[2:])
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(TunerFileError, match="also tunes `lora_te_text_model_encoder_layers_0_mlp_fc1`, `lora_unet_"):
        import_tuner(tmp_path / "in.safetensors", base)
    with caplog.at_level(logging.WARNING):
        tuner = import_tuner(tmp_path / "in.safetensors", base, partial=True)
    assert "skipped 2 modules" in caplog.text
    assert "lora_unet_class_embedding_linear_1" in caplog.text
    assert len(next(tuner.parts()).loras()) == inside
    alone = {key: value for key, value in tensors.items() if key.startswith("lora_te_")}
    save_file(alone, tmp_path / "text.safetensors")
    with pytest.raises(TunerFileError, match="none of the layers of this base that LoRA can act on"):
        import_tuner(tmp_path / "text.safetensors", base, partial=True)


def test_what_no_lora_part_computes_is_refused_by_name(unet, base, tmp_path):
    modules = linear_modules(unet, ["attn1.to_q"])
    tensors = kohya_tensors(unet, modules)
    name = next(iter(tensors)).split(".")[0]
    path = tmp_path / "in.safetensors"
    for extra, message in {f"{name}.dora_scale": "is DoRA, whose weight change depends on the base's weights",
                           f"{name}.hada_w1_a": "is damaged: it has only the tensors hada_w1_a, lora_",
                           f"{name}.lokr_w1": "is damaged: it has only the tensors lokr_w1, lora_",
                           f"{name}.lora_mid.weight": "is LoCon with a middle convolution, but",
                           f"{name}.oft_blocks": "contains OFT",
                           f"{name}.other": "also contains"}.items():  # fmt: skip
        save_file({**tensors, extra: torch.ones(3)}, path)
        with pytest.raises(TunerFileError, match=message):
            import_tuner(path, base)
    half = {key: value for key, value in tensors.items() if key != f"{name}.lora_up.weight"}
    save_file(half, path)
    with pytest.raises(TunerFileError, match="only one of its two weights"):
        import_tuner(path, base)
    for alpha in (-1.0, 0.0):
        save_file({**tensors, f"{name}.alpha": torch.tensor(alpha)}, path)
        with pytest.raises(TunerFileError, match="alpha must be positive"):
            import_tuner(path, base)
    save_file(tensors, path)
    with pytest.raises(TunerFileError, match="for another base: at down"):
        import_tuner(path, describe_base(make_unet(block_out_channels=(32, 32, 64, 64))))
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)}
    for settings, message in [({"unet.use_dora": True}, "use_dora = True"), ([], "not a JSON object"),
                              ({"unet.r": 2, "unet.lora_alpha": "x"}, "its alpha is 'x'")]:  # fmt: skip
        save_file(weights, path, {"lora_adapter_metadata": json.dumps(settings)})
        with pytest.raises(TunerFileError, match=message):
            import_tuner(path, base)


def test_only_lora_fits_a_lora_file(unet, tmp_path):
    for configs in (
        [SkipConfig()],
        [ResConfig(self_attention="lora")],
        [ResConfig(feed_forward="lora", self_attention=None), SkipConfig()],
    ):
        with pytest.raises(TunerFileError, match="Only a tuner of lora alone"):
            export_tuner(Tuner.for_base(unet, *configs), tmp_path / "out.safetensors", "kohya")
    assert not any(tmp_path.iterdir())


def test_a_tuner_that_was_trained_on_after_reading_is_written_whole(unet, base, tmp_path):
    modules, ranks = uneven(unet)
    save_file(kohya_tensors(unet, modules, ranks), tmp_path / "in.safetensors")
    tuner = import_tuner(tmp_path / "in.safetensors", base)
    randomize(tuner, std=0.2)
    export_tuner(tuner, tmp_path / "out.safetensors", "kohya")
    torch.testing.assert_close(by_hand(unet, tmp_path / "out.safetensors"), output(unet, tuner), rtol=0, atol=1e-5)


def test_garbled_notes_cost_the_layout_but_never_the_content(unet, base, tmp_path):
    modules, ranks = uneven(unet)
    save_file(kohya_tensors(unet, modules, ranks), tmp_path / "in.safetensors")
    tuner = import_tuner(tmp_path / "in.safetensors", base)
    expected = output(unet, tuner)
    notes = json.loads(tuner.metadata["restune.interchange.layers"])
    for garbled in ("[1", "[]", '{"a": 3}', json.dumps({site: [999, 3.0] for site in notes}), "[" * 100_000):
        tuner.metadata["restune.interchange.layers"] = garbled
        export_tuner(tuner, tmp_path / "out.safetensors", "kohya")
        again = import_tuner(tmp_path / "out.safetensors", base)
        torch.testing.assert_close(output(unet, again), expected, rtol=0, atol=1e-5)


def test_what_a_header_says_about_training_is_kept(unet, base, tmp_path):
    tensors = kohya_tensors(unet, linear_modules(unet, ["attn2.to_v"]))
    header = {"ss_learning_rate": "1e-4", "modelspec.title": "ink", "modelspec.architecture": "sd/lora",
              "restune.config": "junk", "format": "pt", "ss_tag_frequency": "x" * (9 << 20)}  # fmt: skip
    save_file(tensors, tmp_path / "in.safetensors", header)
    tuner = import_tuner(tmp_path / "in.safetensors", base)
    save_tuner(tuner, tmp_path / "ours.safetensors")
    export_tuner(load_tuner(tmp_path / "ours.safetensors"), tmp_path / "out.safetensors", "kohya")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        kept = file.metadata()
    assert kept["ss_learning_rate"] == "1e-4"
    assert kept["modelspec.title"] == "ink"
    assert kept["ss_network_dim"] == "4"
    assert not any(key.startswith("restune.") or key == "modelspec.architecture" for key in kept)
