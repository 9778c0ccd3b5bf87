"""Pretraining stages on synthetic icons, run through their command line."""

import argparse
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel

from research.restune_tiny.parts.captions import Captions
from research.restune_tiny.parts.flat import Flat
from research.restune_tiny.parts.folders import write_tensors
from research.restune_tiny.parts.icons import VARIANT_WEIGHTS, load_icons, variants
from research.restune_tiny.parts.networks import TextAndUNet
from research.restune_tiny.pretrain_base import main
from research.restune_tiny.stages import denoiser, latents
from research.restune_tiny.stages.autoencoder import new_vae
from research.restune_tiny.stages.pipeline import export_pipeline, load_pipeline
from research.restune_tiny.stages.redraw import REDRAWN, Redrawn
from tests.conftest import ROOT, TINY_BASE

SCRIPT = ROOT / "research" / "restune_tiny" / "pretrain_base.py"
STEPS = ["--steps", "2", "--batch", "4", "--micro", "1", "--workers", "1", "--warmup", "1", "--print-every", "1"]


class OwnProcess:
    """In place of a pool of processes, each of which would take seconds to start."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    map = staticmethod(map)


@pytest.fixture(scope="module", autouse=True)
def one_core():
    """A stage takes all cores there are, here and in child processes; sums come out the same on as many only."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def work(icons, tmp_path_factory):
    """A working folder after the stage `latents`, with an untrained autoencoder."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    new_vae().save_pretrained(folder / "vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "ProcessPoolExecutor", OwnProcess)
        patch.setattr(latents, "PART", 7)
        main(["latents", str(icons), str(folder)])
    return folder


@pytest.fixture(scope="module")
def trained(icons, work):
    """The working folder after two steps of the stage `unet`, and the checkpoint that stood after the first."""
    after_one = work / "after-one"
    export = denoiser.export_pipeline

    def keep_checkpoint(*arguments):
        if not after_one.exists():
            shutil.copytree(work / "unet-checkpoint", after_one / "unet-checkpoint")
        else:
            export(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoiser, "export_pipeline", keep_checkpoint)
        main(unet_command(icons, work, "--export-every", "1"))
    return work


def unet_command(icons, work, *more):
    options = ["--tokenizer", str(TINY_BASE / "tokenizer"), "--export", str(work / "export")]
    return ["unet", str(icons), str(work), *options, *STEPS, *more]


def captions(icons, tokenizer):
    return Captions(load_icons(icons).records, tokenizer)


def test_stored_latents_are_even_and_the_autoencoders_own(icons, work):
    stored = load_file(work / "latents.safetensors")
    found, colours, loaded = stored["latents"].float(), stored["colours"], load_icons(icons)
    assert found.shape == (20, 4, 16, 8, 8)
    share = loaded.weights[:, None] * torch.tensor(VARIANT_WEIGHTS)
    share = (share / share.sum() / 64)[:, :, None, None, None]
    mean = (found * share).sum((0, 1, 3, 4))
    spread = ((found - mean[:, None, None]).square() * share).sum((0, 1, 3, 4)).sqrt()
    torch.testing.assert_close(mean, torch.zeros(16), rtol=0, atol=5e-3)
    torch.testing.assert_close(spread, torch.ones(16), rtol=5e-3, atol=0)

    vae = AutoencoderKL.from_pretrained(work / "vae-normalised").eval()
    pictures, shades = variants(loaded.pixels[9], torch.Generator().manual_seed(9))
    assert colours[9].tolist() == shades
    with torch.no_grad():
        wanted = vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(found[9], wanted, rtol=1e-2, atol=1e-2)  # bfloat16


def test_redrawn_pictures_are_those_that_were_encoded_whatever_the_seed(icons, work, tmp_path, monkeypatch):
    (tmp_path / "vae").symlink_to(work / "vae")
    monkeypatch.setattr(latents, "ProcessPoolExecutor", OwnProcess)
    main(["latents", str(icons), str(tmp_path), "--seed", "5"])
    stored = load_file(tmp_path / "latents.safetensors")
    picks, shapes = torch.tensor([9, 2]), torch.tensor([2, 1])
    wanted = stored["latents"][picks, shapes]
    write_tensors({"latents": wanted, "icons": picks, "variants": shapes, "seed": stored["seed"]}, tmp_path / REDRAWN)
    redrawn = Redrawn(argparse.Namespace(work=tmp_path), load_icons(icons))
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae-normalised").eval()
    with torch.no_grad():
        found = vae.encode(torch.stack([redrawn.picture(0), redrawn.picture(1)])).latent_dist.mean
    torch.testing.assert_close(found * vae.config.scaling_factor, wanted.float(), rtol=1e-2, atol=1e-2)  # bfloat16


def test_redraw_needs_latents_that_say_how_they_were_made(icons, work, tmp_path):
    stored = load_file(work / "latents.safetensors")
    write_tensors({name: stored[name] for name in ("latents", "colours")}, tmp_path / "latents.safetensors")
    start = ["--start", str(TINY_BASE), "--tokenizer", str(TINY_BASE / "tokenizer")]
    with pytest.raises(SystemExit, match="run the stage latents again"):
        main(["redraw", str(icons), str(tmp_path), *start])


def test_unet_stage_exports_a_pipeline_that_draws(icons, tokenizer, trained):
    state = load_file(trained / "unet-checkpoint" / "state.safetensors")
    first = load_file(trained / "after-one" / "unet-checkpoint" / "state.safetensors")
    assert not torch.equal(state["master"], first["master"])
    pipeline = StableDiffusionPipeline.from_pretrained(trained / "export")
    used = captions(icons, tokenizer).used
    averaged = Flat(TextAndUNet(len(used))).views(state["ema"])
    for name, weight in pipeline.unet.state_dict().items():
        torch.testing.assert_close(weight, averaged[f"unet.{name}"].half().float(), rtol=0, atol=0)
    rows = next(value for name, value in averaged.items() if name.endswith("token_embedding.weight"))
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert table.dtype == torch.float32
    assert torch.equal(table[used], rows.half().float())
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("sun, noto style", num_inference_steps=2).images[0].size == (64, 64)


def test_what_is_exported_loads_with_transformers_4_too(trained):
    encoder = load_file(trained / "export" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in encoder)
    exported, bundled = trained / "export" / "tokenizer", TINY_BASE / "tokenizer"
    assert json.loads((exported / "vocab.json").read_text()) == json.loads((bundled / "vocab.json").read_text())
    assert (exported / "merges.txt").read_text() == (bundled / "merges.txt").read_text()


def test_stage_logs_what_it_prints(trained):
    entries = [json.loads(line) for line in (trained / "unet-log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2]
    assert all(entry["images_per_step"] == 4 for entry in entries)
    assert all(entry["loss"] > 0 and entry["error"] > 0 and entry["images_per_second"] > 0 for entry in entries)
    assert 0 < entries[0]["seconds"] < entries[1]["seconds"]


def test_resumed_run_equals_an_uninterrupted_one(icons, trained, tmp_path):
    for name in ("latents.safetensors", "vae-normalised"):
        (tmp_path / name).symlink_to(trained / name)
    shutil.copytree(trained / "after-one" / "unet-checkpoint", tmp_path / "unet-checkpoint")
    # As a script, and from elsewhere, so that nothing but the script itself finds its modules.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(SCRIPT), *unet_command(icons, tmp_path)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert " step 2 loss " in ended.stdout
    assert " step 1 " not in ended.stdout
    resumed = load_file(tmp_path / "unet-checkpoint" / "state.safetensors")
    whole = load_file(trained / "unet-checkpoint" / "state.safetensors")
    assert set(resumed) == {"master", "ema", "first_moment", "second_moment"}
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
    assert json.loads((tmp_path / "unet-checkpoint" / "state.json").read_text()) == {"step": 2}


def test_refine_stage_learns_from_drawings_and_exports(icons, tokenizer, trained, tmp_path):
    for name in ("latents.safetensors", "vae-normalised"):
        (tmp_path / name).symlink_to(trained / name)
    main(["judge", str(icons), str(tmp_path), "--steps", "2", "--batch", "8"])
    start = ["--start", str(trained / "export"), "--tokenizer", str(TINY_BASE / "tokenizer")]
    drawing = ["--drawing-steps", "3", "--learning-steps", "2", "--taught", "1", "--export", str(tmp_path / "export")]
    refine = ["refine", str(icons), str(tmp_path), *start, *drawing, *STEPS, "--export-every", "2"]
    with pytest.raises(SystemExit, match="--learning-steps 2 is above the limit of 1 set by --taught"):
        main([*refine, "--taught", "0.5"])
    for weight in ("--colour-weight", "--evenness-weight"):
        with pytest.raises(SystemExit, match="run the stage `colours` first"):
            main([*refine, weight, "0.01"])
    main(["colours", str(icons), str(tmp_path)])
    main([*refine, "--colour-weight", "0.01", "--evenness-weight", "1"])
    entries = [json.loads(line) for line in (tmp_path / "refine-log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2]
    assert entries[0]["change"] == 0 < entries[1]["change"]
    assert all(entry["uneven"] > 0 for entry in entries)
    state = load_file(tmp_path / "refine-checkpoint" / "state.safetensors")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "export" / "unet").state_dict()
    averaged = Flat(TextAndUNet(len(captions(icons, tokenizer).used)))
    for name, weight in averaged.views(state["ema"]).items():
        if name.startswith("unet."):
            assert torch.equal(unet[name.removeprefix("unet.")], weight.half().float()), name
    before = UNet2DConditionModel.from_pretrained(trained / "export" / "unet").state_dict()
    assert any(not torch.equal(weight, before[name]) for name, weight in unet.items())


def test_decoder_learns_from_what_the_unet_redraws(icons, trained, tmp_path):
    for name in ("latents.safetensors", "vae-normalised"):
        (tmp_path / name).symlink_to(trained / name)
    start = ["--start", str(trained / "export"), "--tokenizer", str(TINY_BASE / "tokenizer")]
    main(["redraw", str(icons), str(tmp_path), *start, "--count", "27", "--variants", "0", "0", "0", "1"])
    loaded = load_icons(icons)
    redrawn = Redrawn(argparse.Namespace(work=tmp_path), loaded)
    assert redrawn.latents.shape == (27, 16, 8, 8)
    assert sorted(redrawn.picks[:20].tolist()) == list(range(20))
    assert redrawn.picks[20:].tolist() == redrawn.picks[:7].tolist()
    assert redrawn.variants.tolist() == [3] * 27
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae-normalised").eval()
    clean = load_file(tmp_path / "latents.safetensors")["latents"][redrawn.picks, 3].float()
    with torch.no_grad():
        pictures = torch.stack([redrawn.picture(pick) for pick in range(27)])
        encoded = vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(encoded, clean, rtol=1e-2, atol=1e-2)  # bfloat16

    main(["decoder", str(icons), str(tmp_path), "--perceptual-weight", "0.5", *STEPS])

    final = AutoencoderKL.from_pretrained(tmp_path / "vae-final").state_dict()
    averaged = Flat(vae).views(load_file(tmp_path / "decoder-checkpoint" / "state.safetensors")["ema"])
    for name, weight in vae.state_dict().items():
        if name.startswith(("decoder", "post_quant_conv")):
            assert torch.equal(final[name], averaged[name]), name
        else:
            assert torch.equal(final[name], weight), name
    assert not torch.equal(final["decoder.conv_out.weight"], vae.decoder.conv_out.weight)
    assert not torch.equal(
        final["decoder.mid_block.resnets.0.conv1.weight"], vae.decoder.mid_block.resnets[0].conv1.weight
    )


def test_exported_pipeline_is_restored_exactly(icons, work, tokenizer, tmp_path):
    used = captions(icons, tokenizer).used
    torch.manual_seed(0)
    module, other = TextAndUNet(len(used)), TextAndUNet(len(used))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    settings = {"work": work, "export": tmp_path / "export", "tokenizer": TINY_BASE / "tokenizer", "seed": 5}
    export_pipeline(dict(module.named_parameters()), used, argparse.Namespace(**settings))

    load_pipeline(other, tmp_path / "export", used)

    for name, parameter in module.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter.half().float()), name
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "export" / "unet")
    assert all(torch.equal(weight, other.unet.state_dict()[name]) for name, weight in unet.state_dict().items())
    encoder = CLIPTextModel.from_pretrained(tmp_path / "export" / "text_encoder")
    table = encoder.get_input_embeddings().weight.detach()
    assert torch.equal(table[used], module.text_encoder.get_input_embeddings().weight.half().float())
    unseen = torch.ones(len(table), dtype=torch.bool)
    unseen[used] = False
    assert float(table[unseen].std()) == pytest.approx(0.02, rel=0.02)


def test_blend_lies_between_two_pipelines(icons, work, tokenizer, tmp_path):
    used = captions(icons, tokenizer).used
    settings = {"work": work, "tokenizer": TINY_BASE / "tokenizer", "seed": 5}
    modules = []
    for name in ("first", "second"):
        modules.append(TextAndUNet(len(used)))
        with torch.no_grad():
            for parameter in modules[-1].parameters():
                parameter.normal_()
        own = argparse.Namespace(**settings, export=tmp_path / name)
        export_pipeline(dict(modules[-1].named_parameters()), used, own)

    main(["blend", str(tmp_path / "first"), str(tmp_path / "second"), str(tmp_path / "out"), "--share", "0.25"])

    mixed = TextAndUNet(len(used))
    load_pipeline(mixed, tmp_path / "out", used)
    for name, parameter in mixed.named_parameters():
        first, second = (module.get_parameter(name).detach() for module in modules)
        torch.testing.assert_close(parameter.detach(), 0.75 * first + 0.25 * second, rtol=2e-3, atol=2e-3)
