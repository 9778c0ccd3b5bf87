import copy
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from peft import LoraConfig

from restune_diffusion import (
    BaseMismatchError,
    RestuneError,
    RestuneStableDiffusionPipeline,
    SkipConfig,
    Tuner,
    TunerFileError,
    TunerNameError,
    save_tuner,
)

from ...conftest import ROOT, TINY_BASE, make_unet
from ..hooks.test_attachment import assert_same, everything


def generate(pipe, prompt="red heart, twemoji style", **kwargs):
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=2, generator=generator, output_type="np", **kwargs).images


def same(one, two):
    return (one == two).all()


def test_load_mix_and_unload(pipe, files):
    before, plain = everything(pipe.unet), generate(pipe)
    pipe.load_tuner_weights(files / "water.safetensors")
    water = generate(pipe)
    assert not same(water, plain)
    pipe.load_tuner_weights(str(files / "watercolor.safetensors"), weight=0.5)
    assert pipe.get_list_tuners() == {"water": 1.0, "watercolor": 0.5}
    assert not same(generate(pipe), water)

    pipe.set_tuners(["water", "watercolor"], [1.0, 0.0])
    assert same(generate(pipe), water)
    assert pipe.get_active_tuners() == ["water"]
    pipe.set_tuners("watercolor")
    watercolor = generate(pipe)
    pipe.set_tuners({"water": 1.0})
    assert same(generate(pipe), water)

    pipe.disable_tuners()
    assert pipe.get_active_tuners() == []
    assert same(generate(pipe), plain)
    pipe.enable_tuners()
    assert same(generate(pipe), water)

    pipe.set_tuners(["water", "watercolor"], 1.0)
    pipe.delete_tuners("water")
    assert pipe.get_list_tuners() == {"watercolor": 1.0}
    assert same(generate(pipe), watercolor)
    pipe.unload_tuner_weights()
    assert same(generate(pipe), plain)
    assert_same(before, everything(pipe.unet))
    pipe.load_tuner_weights(files / "water.safetensors")
    assert same(generate(pipe), water)


def test_a_tuner_is_loaded_again_from_what_save_writes(pipe, files, tmp_path):
    pipe.load_tuner_weights(files / "ink.safetensors")
    ink = generate(pipe)
    assert pipe.save_tuner_weights(tmp_path / "out", "ink") == tmp_path / "out" / "ink.safetensors"
    pipe.unload_tuner_weights()
    pipe.load_tuner_weights(tmp_path / "out", tuner_name="again")
    assert pipe.get_active_tuners() == ["again"]
    assert same(generate(pipe), ink)
    state, metadata = pipe.tuner_state_dict(tmp_path / "out")
    assert "skip.skip.0.down.weight" in state
    assert metadata["restune.format_version"] == "1"


def test_a_tuner_object_can_be_loaded(pipe):
    plain = generate(pipe)
    pipe.load_tuner_weights(Tuner.for_base(pipe.unet, SkipConfig()), "fresh")
    assert same(generate(pipe), plain)


def test_errors_say_what_is_there(pipe, files, tmp_path):
    with pytest.raises(TunerNameError, match="loaded: none"):
        pipe.set_tuners("water")
    with pytest.raises(TunerNameError, match="loaded: none"):
        pipe.delete_tuners("water")
    pipe.load_tuner_weights(files / "watercolor.safetensors")
    with pytest.raises(TunerNameError, match="`watercolor` is taken"):
        pipe.load_tuner_weights(files / "watercolor.safetensors")
    for call in (pipe.set_tuners, pipe.delete_tuners):
        with pytest.raises(TunerNameError, match="No tuner named 'water' is loaded; loaded: watercolor"):
            call(["watercolor", "water"])
    assert pipe.get_list_tuners() == {"watercolor": 1.0}
    with pytest.raises(RestuneError, match="1 tuner names but 2 weights"):
        pipe.set_tuners(["watercolor"], [1.0, 2.0])
    with pytest.raises(RestuneError, match="give only one of them"):
        pipe.set_tuners({"watercolor": 1.0}, 1.0)
    with pytest.raises(RestuneError, match=r"contains 3 safetensors files \(ink.safetensors, .*\); select one with"):
        pipe.load_tuner_weights(files)
    with pytest.raises(TunerFileError, match="There is no oil"):
        pipe.load_tuner_weights(files, weight_name="oil.safetensors")
    with pytest.raises(TunerNameError, match="is not a valid tuner name"):
        pipe.load_tuner_weights(files / "water.safetensors", tuner_name="../water")
    pipe.load_tuner_weights(files, weight_name="water.safetensors")
    assert list(pipe.get_list_tuners()) == ["watercolor", "water"]


@pytest.mark.parametrize("path", ["missing.safetensors", "folder/missing.safetensors", "/nowhere/x", "a/b/c", "name"])
def test_a_path_that_is_not_there_is_no_network_call(pipe, path):
    with pytest.raises(TunerFileError, match=f"There is no tuner file at {path}"):
        pipe.load_tuner_weights(path)


def test_a_hub_id_respects_offline(pipe, tmp_path):
    with pytest.raises(
        TunerFileError, match="no local file or folder someone/style, and the download from the Hub failed"
    ):
        pipe.load_tuner_weights("someone/style", cache_dir=tmp_path, local_files_only=True)


def test_a_tuner_for_another_base_is_refused_and_nothing_stays(pipe, tmp_path):
    before = everything(pipe.unet)
    save_tuner(Tuner.for_base(make_unet(), SkipConfig()), tmp_path / "other.safetensors")
    with pytest.raises(BaseMismatchError, match="This tuner was made for a base with block_out_channels"):
        pipe.load_tuner_weights(tmp_path / "other.safetensors")
    assert pipe.get_list_tuners() == {}
    assert_same(before, everything(pipe.unet))


def test_saving_the_pipeline_saves_a_pristine_base(pipe, files, tmp_path):
    plain = generate(pipe)
    pipe.load_tuner_weights(files / "water.safetensors")
    assert not same(generate(pipe), plain)
    pipe.unet.save_pretrained(tmp_path / "unet")
    reloaded = type(pipe.unet).from_pretrained(tmp_path / "unet")
    assert reloaded.state_dict().keys() == pipe.unet.state_dict().keys()
    again = RestuneStableDiffusionPipeline(**{**pipe.components, "unet": reloaded}, requires_safety_checker=False)
    assert same(generate(again), plain)


def test_lora_works_beside_tuners(pipe, files):
    plain = generate(pipe)

    def add_lora():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipe.unet.add_adapter(
                LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False), "lora"
            )

    add_lora()
    lora = generate(pipe)
    assert not same(lora, plain)
    pipe.load_tuner_weights(files / "water.safetensors")
    both = generate(pipe)
    assert not same(both, lora)
    pipe.set_adapters("lora", 0.0)
    tuner_alone = generate(pipe)
    pipe.set_adapters("lora", 1.0)
    assert same(generate(pipe), both)
    pipe.disable_tuners()
    assert same(generate(pipe), lora)
    pipe.enable_tuners()
    pipe.unload_lora_weights()
    assert same(generate(pipe), tuner_alone)
    pipe.unload_tuner_weights()
    assert same(generate(pipe), plain)


def test_lora_is_saved_and_loaded_by_diffusers_while_a_tuner_is_on(pipe, files, tmp_path):
    from peft.utils import get_peft_model_state_dict

    pipe.load_tuner_weights(files / "water.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.unet.add_adapter(
            LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False), "default"
        )
    both = generate(pipe)
    state = get_peft_model_state_dict(pipe.unet)
    assert not [key for key in state if "skip" in key]
    pipe.save_lora_weights(tmp_path, unet_lora_layers=state)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert same(generate(pipe), both)


def test_guidance_and_batches_reach_the_tuner(pipe, files):
    pipe.load_tuner_weights(files / "water.safetensors")
    for guidance in (1.0, 5.0):
        one = generate(pipe, guidance_scale=guidance)
        pipe.set_tuners({})
        assert not same(generate(pipe, guidance_scale=guidance), one)
        pipe.set_tuners("water")
    batch = generate(pipe, ["cat face", "red heart"], num_images_per_prompt=2)
    assert batch.shape == (4, 64, 64, 3)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("water", "a list with one entry for each prompt"),
        ({"water": 0.5}, "a list with one entry for each prompt"),
        ([{"water": "much"}], "An entry of `tuners` is a name"),
        ([["water"]], "An entry of `tuners` is a name"),
        ([1], "An entry of `tuners` is a name"),
    ],
)
def test_a_mix_of_another_form_is_refused(pipe, files, mix, message):
    pipe.load_tuner_weights(files / "water.safetensors", "water")
    with pytest.raises(RestuneError, match=message):
        generate(pipe, tuners=mix)


def test_a_mix_while_tuners_are_disabled_is_refused(pipe, files):
    pipe.load_tuner_weights(files / "water.safetensors", "water")
    pipe.disable_tuners()
    plain = generate(pipe)
    with pytest.raises(RestuneError, match="call enable_tuners"):
        generate(pipe, tuners=["water"])
    assert same(generate(pipe, tuners=[None]), plain)


def test_another_scheduler_leaves_tuners_working(pipe, files):
    pipe.load_tuner_weights(files / "water.safetensors")
    reference = generate(pipe)
    other = copy.copy(pipe)
    other.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert same(generate(other), reference)


CUSTOM = """
import sys
import torch
from diffusers import DiffusionPipeline

base, file, tuner = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline=file, trust_remote_code=True)
assert type(pipe).__name__ == "RestuneStableDiffusionPipeline"
pipe.load_tuner_weights(tuner)
image = pipe(
    "red heart, twemoji style", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt"
).images
torch.manual_seed(0)
from safetensors.torch import save_file
save_file({"image": image}, sys.argv[3] + ".out")
"""


def test_custom_pipeline_loads_in_a_new_process(pipe, files, tmp_path):
    from safetensors.torch import load_file

    shutil.copy(files / "water.safetensors", tmp_path / "water.safetensors")
    file = ROOT / "pipelines" / "restune_stable_diffusion.py"
    env = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", CUSTOM, TINY_BASE, file, tmp_path / "water.safetensors"],
        check=True,
        env={**os.environ, **env},
    )
    image = load_file(tmp_path / "water.safetensors.out")["image"]
    pipe.load_tuner_weights(files / "water.safetensors")
    assert same(image.permute(0, 2, 3, 1).numpy(), generate(pipe))


def test_custom_pipeline_loads_in_this_process(files, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = DiffusionPipeline.from_pretrained(
            str(TINY_BASE),
            custom_pipeline=str(ROOT / "pipelines" / "restune_stable_diffusion.py"),
            trust_remote_code=True,
        )
    assert isinstance(pipe, RestuneStableDiffusionPipeline)
    pipe.load_tuner_weights(files / "water.safetensors")
    assert pipe.get_active_tuners() == ["water"]
