"""LoHa, LoKr, DoRA and full differences of other programs, against those programs' own modules."""

from __future__ import annotations

import contextlib

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from restune_diffusion import RestuneError, Tuner, TunerFileError, attach, describe_base, load_tuner
from restune_diffusion.backbones import module_path
from restune_diffusion.conversion import convert, export_tuner, import_tuner
from restune_diffusion.conversion.products.reduction import Reduction

from ...conftest import make_inputs, make_unet

# One level with attention is fast, and every kind of linear layer occurs in it.
SMALL = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def small_unet() -> UNet2DConditionModel:
    return make_unet(**SMALL)


def output(unet: torch.nn.Module, tuner: Tuner | None = None) -> torch.Tensor:
    with torch.no_grad(), contextlib.nullcontext() if tuner is None else attach(unet, tuner):
        return unet(*make_inputs(batch=1)).sample


def fill(module: torch.nn.Module, names: tuple[str, ...], std: float) -> None:
    """Give the parameters of a trainer's module values as after training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if any(part in name for part in names):
                value.copy_(torch.randn(value.shape, generator=generator) * std)
            elif "dora_scale" in name or "magnitude" in name:
                value.mul_(1 + 0.2 * torch.rand(value.shape, generator=generator))


def weights_of(unet: UNet2DConditionModel):
    return lambda site: unet.get_submodule(module_path(site)).weight.detach()


LYCORIS = {
    "loha": {"algo": "loha"},
    "loha of full rank": {"algo": "loha", "linear_dim": 7},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr, both decomposed": {"algo": "lokr", "factor": 8, "decompose_both": True, "linear_dim": 2},
    "lokr, matrices": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr, other factor": {"algo": "lokr", "factor": -1, "unbalanced_factorization": True},
    "rslora": {"algo": "lora", "rs_lora": True},
    "full": {"algo": "full"},
    "dora": {"algo": "lora", "dora_wd": True},
    "dora by inputs": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "doha": {"algo": "loha", "dora_wd": True},
    "dokr": {"algo": "lokr", "factor": 4, "dora_wd": True},
}


@pytest.mark.parametrize("settings", LYCORIS.values(), ids=LYCORIS)
def test_a_file_of_lycoris_acts_as_in_lycoris(tmp_path, settings):
    lycoris = pytest.importorskip("lycoris")
    unet, tuned = small_unet(), small_unet()
    lycoris.LycorisNetwork.apply_preset({"target_module": ["BasicTransformerBlock"], "target_name": []})
    network = lycoris.create_lycoris(tuned, 1.0, **{"linear_dim": 3, "linear_alpha": 2.0, **settings})
    network.apply_to()
    fill(network, ("lora_", "hada_", "lokr_", "weight"), 0.2)
    state = {key: value.detach().clone().contiguous() for key, value in network.state_dict().items()}
    expected = output(tuned)
    assert (output(unet) - expected).abs().max() > 0.01
    for prefix in ("lycoris_", "lora_unet_"):
        save_file(
            {key.replace("lycoris_", prefix): value for key, value in state.items()}, tmp_path / "in.safetensors"
        )
        tuner = import_tuner(tmp_path / "in.safetensors", describe_base(unet), base_weights=weights_of(unet))
        torch.testing.assert_close(output(unet, tuner), expected, rtol=0, atol=1e-5)


PEFT = {
    "loha": LoHaConfig(r=3, alpha=2, target_modules=TARGETS, init_weights=False),
    "lokr": LoKrConfig(r=3, alpha=2, target_modules=TARGETS, init_weights=False, decompose_factor=4),
    "lokr, both decomposed": LoKrConfig(r=2, alpha=3, target_modules=TARGETS, init_weights=False, decompose_factor=8,
                                        decompose_both=True),
    # PEFT scales a product of two matrices, LyCORIS does not.
    "lokr, matrices": LoKrConfig(r=64, alpha=40, target_modules=TARGETS, init_weights=False, decompose_factor=4),
    "lokr, patterns": LoKrConfig(r=3, alpha=2, target_modules=TARGETS, init_weights=False,
                                 rank_pattern={"to_k": 2}, alpha_pattern={"to_v": 5}),
    "dora": LoraConfig(r=3, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    "dora, rslora": LoraConfig(r=3, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False, use_dora=True,
                               use_rslora=True),
}  # fmt: skip


@pytest.mark.parametrize("config", PEFT.values(), ids=PEFT)
def test_a_folder_of_peft_acts_as_in_peft(tmp_path, config):
    unet = small_unet()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tuned = get_peft_model(small_unet(), config)
    assert isinstance(tuned, PeftModel)
    # PEFT starts LoHa and LoKr near zero even without `init_weights`.
    fill(tuned, ("lora_A", "lora_B", "hada_", "lokr_"), 0.3)
    tuned.save_pretrained(tmp_path)
    expected = output(tuned)
    assert (output(unet) - expected).abs().max() > 0.01
    tuner = import_tuner(tmp_path, describe_base(unet), base_weights=weights_of(unet))
    torch.testing.assert_close(output(unet, tuner), expected, rtol=0, atol=1e-5)


def loha_file(unet: UNet2DConditionModel, path, prefix: str = "lora_unet_") -> dict[str, torch.Tensor]:
    """A LoHa of one linear layer of each operation, in kohya's names; the rank of its product is 4."""
    generator = torch.Generator().manual_seed(7)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    tensors = {}
    for name in ("attn1.to_q", "attn2.to_k", "ff.net.2"):
        layer = unet.get_submodule(f"{block}.{name}")
        for half in ("w1", "w2"):
            shapes = {"a": (layer.out_features, 2), "b": (2, layer.in_features)}
            for factor, shape in shapes.items():
                key = f"{prefix}{block}.{name}".replace(".", "_") + f".hada_{half}_{factor}"
                tensors[key] = torch.randn(shape, generator=generator) * 0.5
        tensors[f"{prefix}{block}.{name}".replace(".", "_") + ".alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    return tensors


def test_a_rank_or_an_energy_limits_the_product(tmp_path):
    unet = small_unet()
    base = describe_base(unet)
    loha_file(unet, tmp_path / "in.safetensors")
    exact = import_tuner(tmp_path / "in.safetensors", base)
    for limit, kept, ranks in [
        (Reduction(4), 1.0, {4}),
        (Reduction(2), None, {2}),
        (Reduction(energy=1.0), 1.0, {4}),
        (Reduction(energy=0.7), None, {1, 2, 3}),
        (Reduction(1, 0.7), None, {1}),
    ]:
        tuner = import_tuner(tmp_path / "in.safetensors", base, reduction=limit)
        products = {site: lora.delta() for site, lora in next(exact.parts()).loras().items()}
        ours = {site: lora.delta() for site, lora in next(tuner.parts()).loras().items()}
        total = sum(float(product.square().sum()) for product in products.values())
        lost = sum(float((products[site] - ours[site]).square().sum()) for site in products)
        assert limit.kept == pytest.approx(1 - lost / total, abs=1e-5)
        assert kept is None or limit.kept == pytest.approx(kept)
        for site, product in products.items():
            values = torch.linalg.svdvals(product)
            rank = int(torch.linalg.matrix_rank(ours[site], rtol=1e-4))
            assert not product.any() or rank in ranks
            if limit.energy is not None and limit.rank is None:
                shares = values.square().cumsum(0) / values.square().sum()
                assert not product.any() or float(shares[rank - 1]) >= limit.energy - 1e-6
    for wrong in ({"rank": 0}, {"energy": 0.0}, {"energy": 1.5}):
        with pytest.raises(RestuneError, match="must be"):
            Reduction(**wrong)


def test_a_converted_loha_leaves_as_a_lora_with_the_same_effect(tmp_path):
    unet = small_unet()
    loha_file(unet, tmp_path / "in.safetensors")
    tuner = import_tuner(tmp_path / "in.safetensors", describe_base(unet))
    for layout in ("kohya", "diffusers"):
        export_tuner(tuner, tmp_path / f"{layout}.safetensors", layout)
        again = import_tuner(tmp_path / f"{layout}.safetensors", describe_base(unet))
        torch.testing.assert_close(output(unet, again), output(unet, tuner), rtol=0, atol=1e-6)


def test_dora_needs_the_weights_of_its_base(tmp_path):
    unet = small_unet()
    unet.save_pretrained(tmp_path / "base" / "unet")
    tensors = loha_file(unet, tmp_path / "in.safetensors")
    name = next(iter(tensors)).split(".")[0]
    save_file({**tensors, f"{name}.dora_scale": torch.full((32, 1), 2.0)}, tmp_path / "in.safetensors")
    with pytest.raises(TunerFileError, match="is DoRA, whose weight change depends on the base's weights"):
        import_tuner(tmp_path / "in.safetensors", describe_base(unet))
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "restune", base=str(tmp_path / "base"))
    (site,) = (site for site in next(load_tuner(tmp_path / "out.safetensors").parts()).loras() if "self.to_q" in site)
    delta = next(load_tuner(tmp_path / "out.safetensors").parts()).loras()[site].delta()
    norms = (unet.get_submodule(module_path(site)).weight + delta).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((32,), 2.0))
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(RestuneError, match=r"DoRA needs the weights of the base, but .* has no diffusion_pytorch"):
        convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "restune", base=str(tmp_path / "base"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hada_w1_a": None}, "it has only the tensors hada_w1_b, hada_w2_a, hada_w2_b"),
        ({"hada_w1_b": torch.ones(3, 32)}, "its tensors .* do not fit together"),
        ({"hada_w1_a": torch.ones(16, 2), "hada_w2_a": torch.ones(16, 2)}, "is for another base: at down"),
        ({"hada_t1": torch.ones(2, 2, 3, 3)}, "is LoHa of a convolution, but this base has a linear layer there"),
        ({"hada_w1_a": torch.ones(32, 2, 1)}, "has the form of a convolution, but"),
        ({"alpha": torch.ones(2)}, "its alpha has 2 values"),
        ({"diff": torch.ones(32, 32)}, "it has only the tensors diff, hada_"),
        ({"diff_b": torch.ones(32)}, "also changes the bias, which no tuner does"),
        ({"dora_scale": torch.ones(31, 1)}, r"its magnitude has the shape \(31, 1\)"),
    ],
)
def test_a_damaged_module_is_named(tmp_path, change, message):
    unet = small_unet()
    tensors = loha_file(unet, tmp_path / "in.safetensors")
    name = next(iter(tensors)).split(".")[0]
    tensors |= {f"{name}.{tensor}": value for tensor, value in change.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, tmp_path / "in.safetensors")
    with pytest.raises(TunerFileError, match=message):
        import_tuner(tmp_path / "in.safetensors", describe_base(unet), base_weights=weights_of(unet))


def test_an_exact_tuner_of_high_rank_is_announced(tmp_path, caplog):
    unet = make_unet(**SMALL | {"block_out_channels": (320, 320)})
    key = "lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.diff"
    save_file({key: torch.randn(320, 320)}, tmp_path / "in.safetensors")
    import_tuner(tmp_path / "in.safetensors", describe_base(unet))
    assert "needs rank 320 in all layers of `res` to be exact" in caplog.text
    caplog.clear()
    import_tuner(tmp_path / "in.safetensors", describe_base(unet), reduction=Reduction(8))
    assert not caplog.text
