"""LoRA extracted from a fine-tuned checkpoint: the difference of its weights, and what is left out of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from restune_diffusion import RestuneError, load_tuner
from restune_diffusion.cli import main
from restune_diffusion.conversion import convert, describe_checkpoint
from restune_diffusion.conversion.extraction import extract_lora
from restune_diffusion.conversion.extraction.checkpoint import open_checkpoint
from restune_diffusion.conversion.extraction.low_rank import low_rank
from restune_diffusion.conversion.products.reduction import Reduction
from restune_diffusion.pipelines.load_base import load_base

from ... import tiny_training as tiny
from ...ldm_layout import write_single_file

Change = Callable[[str, torch.Tensor], torch.Tensor | None]
Restune = Callable[..., tuple[int, str, str]]


def change_weights(model: torch.nn.Module, chosen: Callable[[str], bool], rank: int | None = None) -> None:
    """Change the chosen weights by about a tenth, at a rank or fully."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not chosen(name):
                continue
            flat = parameter.flatten(1) if parameter.dim() > 1 else parameter[:, None]
            inner = rank or min(flat.shape)
            change = torch.randn(flat.shape[0], inner, generator=generator) @ torch.randn(
                inner, flat.shape[1], generator=generator
            )
            size = 0.1 * max(float(flat.norm()), 1.0) / float(change.norm())
            parameter.add_((change * size).reshape(parameter.shape))


def representable(name: str) -> bool:
    """Return whether LoRA can act on a weight of the U-Net or of a text encoder's layers."""
    return name.endswith(".weight") and "norm" not in name and "embeddings." not in name


def pipelines(folder: Path, kind: str, chosen: Callable[[str], bool] = representable, rank: int | None = None) -> Any:
    make = {"sd": tiny.sd_pipeline, "sdxl": tiny.sdxl_pipeline}[kind]
    base, tuned = make(), make()
    for name in ("unet", "text_encoder", "text_encoder_2"):
        if getattr(tuned, name, None) is not None:
            change_weights(getattr(tuned, name), lambda key: chosen(key) and "text_projection" not in key, rank)
    base.save_pretrained(folder / "base")
    tuned.save_pretrained(folder / "tuned")
    return base, tuned


@torch.no_grad()
def outputs(pipe: Any) -> list[torch.Tensor]:
    """Return the text embeddings and the U-Net's output of a pipeline."""
    encoded = pipe.encode_prompt(
        prompt="a red disc", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    added = {}
    if len(encoded) == 4:
        added = {"text_embeds": encoded[2], "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]])}
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sample = pipe.unet(latents, torch.tensor(300), encoded[0], added_cond_kwargs=added).sample
    return [encoded[0], sample]


def tuned_by(folder: Path, tuner: Any, tmp_path: Path) -> list[torch.Tensor]:
    pipe = load_base(str(folder), torch.float32)
    pipe.load_tuner_weights(tuner, "extracted")
    return outputs(pipe)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_full_rank_is_the_fine_tuned_model(tmp_path, kind):
    base, tuned = pipelines(tmp_path, kind)
    plain, expected = outputs(base), outputs(tuned)
    assert all((one - other).abs().max() > 0.01 for one, other in zip(plain, expected, strict=True))
    extraction = extract_lora(str(tmp_path / "tuned"), str(tmp_path / "base"))
    assert not extraction.report.left_out
    assert extraction.report.kept > 1 - 1e-6
    convert(tmp_path / "tuned", tmp_path / "out.safetensors", "restune", base=str(tmp_path / "base"))
    found = tuned_by(tmp_path / "base", tmp_path / "out.safetensors", tmp_path)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "family"), [("sd", "sd1"), ("sd", "sd2"), ("sdxl", "sdxl")])
def test_a_change_of_low_rank_is_found_in_files_of_the_original_layout(tmp_path, kind, family):
    base, tuned = pipelines(tmp_path, kind, rank=3)
    for name, pipe in (("base", base), ("tuned", tuned)):
        write_single_file(tmp_path / f"{name}.safetensors", family, pipe.components)
    structure = describe_checkpoint(str(tmp_path / "base"))
    with open_checkpoint(str(tmp_path / "tuned.safetensors"), structure) as file:
        for component, places in file.places.items():
            state = getattr(tuned, component).state_dict()
            own = {key.removeprefix("text_model."): value for key, value in state.items() if value.is_floating_point()}
            # A file of SD 2.x has a layer and a projection more than the encoder in diffusers' format.
            assert own.keys() <= places.keys()
            assert all(torch.equal(file.read(component, key), value) for key, value in own.items())
    folder, file = (
        extract_lora(str(tmp_path / source), str(tmp_path / "base"), Reduction(rank=8))
        for source in ("tuned", "tuned.safetensors")
    )
    assert {layer.rank for layer in file.report.layers} <= {1, 2, 3}
    assert file.report.kept > 1 - 1e-6
    assert file.report.layers == folder.report.layers
    assert {layer.component for layer in file.report.layers} == {*file_components(kind)}
    one, other = folder.tuner.state_dict(), file.tuner.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


def file_components(kind: str) -> list[str]:
    return ["unet", "text_encoder", *(["text_encoder_2"] if kind == "sdxl" else [])]


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (5, 4, 3, 3), (7, 7)])
def test_the_decomposition_of_a_full_rank_is_exact(shape):
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    layer, kept = low_rank(change, Reduction())
    torch.testing.assert_close(layer.up @ layer.down, change.flatten(1), rtol=0, atol=5e-9)
    assert kept == pytest.approx(1)
    half, kept = low_rank(change, Reduction(energy=0.5))
    values = torch.linalg.svdvals(change.flatten(1).double()) ** 2
    shares = values.cumsum(0) / values.sum()
    assert half.rank == int((shares < 0.5).sum()) + 1
    assert kept == pytest.approx(float(shares[half.rank - 1]), abs=1e-6)
    error = (change.flatten(1) - half.up @ half.down).double().square().sum() / values.sum()
    assert float(error) == pytest.approx(1 - kept, abs=1e-5)


def test_what_no_tuner_represents_is_listed_with_its_share(tmp_path, capsys):
    base, tuned = pipelines(tmp_path, "sd", chosen=lambda name: True)
    report = extract_lora(str(tmp_path / "tuned"), str(tmp_path / "base"), Reduction(rank=4)).report
    kinds = {each.name: each.kind for each in report.left_out if each.component == "unet"}
    assert kinds["conv_in.bias"] == kinds["down_blocks.0.attentions.0.proj_in.bias"] == "bias"
    assert kinds["conv_norm_out.weight"] == kinds["conv_norm_out.bias"] == "norm"
    assert {each.kind for each in report.left_out if each.component == "text_encoder"} == {"bias", "norm", "embedding"}
    old, new = base.unet.state_dict(), tuned.unet.state_dict()
    texts = [(base.text_encoder.state_dict()[key], value) for key, value in tuned.text_encoder.state_dict().items()]
    total = sum(float((one - new[key]).double().square().sum()) for key, one in old.items())
    total += sum(float((one - other).double().square().sum()) for one, other in texts if one.is_floating_point())
    assert report.total == pytest.approx(total, rel=1e-4)
    written = report.as_json()
    assert sum(each["share"] for each in written["left_out"]) == pytest.approx(
        1 - sum(layer.norm**2 for layer in report.layers) / total, rel=1e-3
    )
    assert json.loads(json.dumps(written)) == written
    assert "norm tensors" in report.describe()


def rewrite(file: Path, change: Change, dtype: torch.dtype | None = None) -> None:
    tensors = load_file(file)
    changed = {key: value if (new := change(key, value)) is None else new for key, value in tensors.items()}
    save_file({key: value.to(dtype or value.dtype) for key, value in changed.items()}, file)


def test_a_source_in_half_precision_differs_only_where_it_was_trained(tmp_path):
    pipelines(tmp_path, "sd", chosen=lambda name: name.endswith("attn1.to_q.weight"))
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        rewrite(tmp_path / "tuned" / f"{name}.safetensors", lambda key, value: None, torch.float16)
    extraction = extract_lora(str(tmp_path / "tuned"), str(tmp_path / "base"), Reduction(rank=4))
    assert {layer.name.rpartition(".")[2] for layer in extraction.report.layers} == {"to_q"}
    assert not extraction.report.left_out
    assert extraction.report.unchanged > 700
    tuner = load_tuner_of(extraction, tmp_path)
    assert {config.part for config in tuner.configs} == {"res"}


def load_tuner_of(extraction: Any, tmp_path: Path) -> Any:
    from restune_diffusion import save_tuner

    save_tuner(extraction.tuner, tmp_path / "extracted.safetensors")
    return load_tuner(tmp_path / "extracted.safetensors")


def test_the_folder_of_a_unet_and_shards_are_read(tmp_path):
    _, tuned = pipelines(tmp_path, "sd", chosen=lambda name: "to_k.weight" in name)
    folder = tmp_path / "unet"
    tuned.unet.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*-of-*.safetensors"))) > 1
    rows = [extract_lora(str(source), str(tmp_path / "base"), Reduction(rank=2)).report.layers
            for source in (tmp_path / "tuned", folder)]  # fmt: skip
    assert [row for row in rows[0] if row.component == "unet"] == rows[1]


def refusals(tmp_path: Path) -> Iterable[tuple[str, str]]:
    base, tuned = pipelines(tmp_path, "sd", chosen=lambda name: "norm" in name)
    yield "base", "does not differ from its base"
    yield "tuned", "only differs in layers that no tuner represents, such as norms and biases, from its base"
    base.unet.register_to_config(cross_attention_dim=64)
    UNet2DConditionModel.from_config(base.unet.config).save_pretrained(tmp_path / "other" / "unet")
    yield "other", r"was not fine-tuned from .*: `.*attn2\.to_k\.weight` of its unet has the shape"
    tuned.save_pretrained(tmp_path / "nan")
    rewrite(
        tmp_path / "nan/unet/diffusion_pytorch_model.safetensors",
        lambda key, value: value * float("nan") if "conv_in.weight" in key else None,
    )
    yield "nan", r"is damaged: `conv_in\.weight` of its unet has NaN or infinity"
    tuned.save_pretrained(tmp_path / "short")
    file = tmp_path / "short/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if "to_q" not in key}, file)
    yield "short", "its unet lacks 32 tensors"
    tuned.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    yield "pickled", "has no weights of a U-Net in safetensors files"


def test_checkpoints_that_do_not_fit_are_refused_in_one_sentence(tmp_path):
    for name, reason in refusals(tmp_path):
        with pytest.raises(RestuneError, match=reason):
            extract_lora(str(tmp_path / name), str(tmp_path / "base"), Reduction(rank=2))
    with pytest.raises(RestuneError, match="is a whole checkpoint; pass the checkpoint that it was trained from"):
        convert(tmp_path / "tuned", tmp_path / "out.safetensors", "restune")


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return int(exited.value.code or 0), shown.out, shown.err


def test_the_command_writes_a_tuner_and_a_report(tmp_path, capsys):
    pipelines(tmp_path, "sd", chosen=lambda name: name.startswith("up_blocks.3.attentions") or "conv_norm_out" in name)
    output, report = tmp_path / "out.safetensors", tmp_path / "report.json"
    arguments = ("convert", tmp_path / "tuned", output, "--to=restune", "--base", tmp_path / "base", "--rank=4")
    code, shown, errors = command(capsys, *arguments, "--report", report)
    assert code == 0, errors
    written = json.loads(report.read_text())
    lines = shown.splitlines()
    assert lines[0].startswith(f"unet: {len(written['layers'])} layers, ranks 4 to 4, keep ")
    assert f"{written['kept_of_layers']:.2%} of their change" in lines[0]
    assert lines[-2:] == [str(report), str(output)]
    assert {each["kind"] for each in written["left_out"]} == {"norm", "bias"}
    assert written["kept"] < written["kept_of_layers"] < 1
    assert load_tuner(output).configs[0].width == 4
    # The file of another program has the same layers.
    code, _, errors = command(capsys, *arguments[:2], tmp_path / "kohya.safetensors", "--to=kohya", *arguments[4:])
    assert code == 0, errors
    assert len(load_file(tmp_path / "kohya.safetensors")) == 3 * len(written["layers"])
    for changed, reason in (
        (
            ("convert", tmp_path / "tuned", tmp_path / "new.safetensors", "--to=restune"),
            "is a checkpoint; give the one",
        ),
        (
            (*arguments[:1], output, tmp_path / "new.safetensors", "--to=kohya", "--report=new.json"),
            "--report describes",
        ),
        (arguments, "exists; choose another output"),
    ):
        code, _, errors = command(capsys, *changed)
        assert code != 0
        assert errors.count("\n") == 1
        assert reason in errors
    assert not (tmp_path / "new.safetensors").exists()
