"""`enable_restune` on pipelines that have no class of their own here."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MotionAdapter,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)

from restune_diffusion import (
    RestuneError,
    RestuneLoaderMixin,
    RestuneStableDiffusionPipeline,
    TunerManager,
    enable_restune,
)

from ...tiny_pipelines import (
    KINDS_BY_NAME,
    PAG_KINDS,
    SIZE,
    TUNERS,
    Kind,
    difference,
    draw,
    identical,
    make_tuner,
    sd_components,
    sd_unet,
    sdxl_components,
)

PAG = KINDS_BY_NAME["StableDiffusionPAGPipeline"]


@pytest.fixture(scope="module")
def components():
    # On 32 pixels the middle block sees one token, on which perturbed attention does nothing.
    return {
        False: {**sd_components(), "pag_applied_layers": ["down", "up"]},
        True: {**sdxl_components(), "pag_applied_layers": ["down", "up"]},
    }


@pytest.fixture
def pag(components):
    """A plain PAG pipeline, and its picture."""
    pipe = PAG.make(PAG.plain, components[False])
    yield pipe, draw(pipe, PAG)
    assert TunerManager.of(pipe.unet) is None


def test_the_methods_come_without_patching(pag):
    plain, expected = pag
    pipe = enable_restune(plain)
    assert isinstance(pipe, RestuneLoaderMixin)
    assert isinstance(pipe, StableDiffusionPAGPipeline)
    assert type(pipe).__name__ == "StableDiffusionPAGPipeline"
    assert type(plain) is StableDiffusionPAGPipeline
    assert not hasattr(StableDiffusionPAGPipeline, "load_tuner_weights")
    assert pipe.components == plain.components
    assert identical(draw(pipe, PAG), expected)
    pipe.load_tuner_weights(make_tuner(pipe.unet), "style")
    tuned = draw(pipe, PAG)
    assert difference(tuned, expected) > 1e-2
    pipe.disable_tuners()
    assert identical(draw(pipe, PAG), expected)
    pipe.unload_tuner_weights()


def test_a_class_is_made_once_and_nothing_is_enabled_twice(pag, components):
    plain, _ = pag
    pipe = enable_restune(plain)
    assert type(enable_restune(PAG.make(PAG.plain, components[False]))) is type(pipe)
    assert enable_restune(pipe) is pipe
    kind = KINDS_BY_NAME["StableDiffusionPipeline"]
    ours = kind.make(kind.ours, components[False])
    assert enable_restune(ours) is ours
    assert type(ours) is RestuneStableDiffusionPipeline


def test_state_that_is_no_component_is_kept(pag):
    plain, _ = pag
    plain.vae_scale_factor = 4
    plain.set_progress_bar_config(desc="drawing")
    pipe = enable_restune(plain)
    assert pipe.vae_scale_factor == 4
    assert pipe._progress_bar_config == {"desc": "drawing"}
    pipe.scheduler = DDPMScheduler()
    assert type(plain.scheduler).__name__ == "DDIMScheduler"


def test_it_is_saved_under_the_name_of_its_own_class(pag, tmp_path):
    plain, expected = pag
    pipe = enable_restune(plain)
    pipe.load_tuner_weights(make_tuner(pipe.unet), "style")
    pipe.save_pretrained(tmp_path / "ours")
    pipe.unload_tuner_weights()
    plain.save_config(tmp_path / "plain")
    index, plain_index = (tmp_path / folder / "model_index.json" for folder in ("ours", "plain"))
    assert index.read_text() == plain_index.read_text()
    layers = {"pag_applied_layers": ["down", "up"]}
    again = DiffusionPipeline.from_pretrained(tmp_path / "ours", **layers)
    assert type(again) is StableDiffusionPAGPipeline
    assert difference(draw(again, PAG), expected) < 1e-4
    enabled = type(pipe).from_pretrained(tmp_path / "ours", **layers)
    assert type(enabled) is type(pipe)
    assert identical(draw(enabled, PAG), draw(again, PAG))


def test_diffusers_takes_it_for_the_original(pag):
    plain, expected = pag
    pipe = enable_restune(plain)
    pipe.load_tuner_weights(make_tuner(pipe.unet), "style")
    tuned = draw(pipe, PAG)
    assert type(AutoPipelineForImage2Image.from_pipe(pipe, enable_pag=False)) is StableDiffusionImg2ImgPipeline
    assert type(StableDiffusionPipeline.from_pipe(pipe)) is StableDiffusionPipeline
    sibling = type(pipe).from_pipe(plain, pag_applied_layers=["down", "up"])
    assert sibling.get_list_tuners() == {"style": 1.0}
    assert identical(draw(sibling, PAG), tuned)
    for copied in (copy.copy(pipe), copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert type(copied) is type(pipe)
        assert copied.get_list_tuners() == {"style": 1.0}
        assert identical(draw(copied, PAG), tuned)
    pipe.unload_tuner_weights()
    assert identical(draw(pipe, PAG), expected)


@pytest.mark.parametrize("guidance", [1.0, 5.0], ids=["two copies", "three copies"])
@pytest.mark.parametrize("kind", PAG_KINDS, ids=lambda kind: kind.name)
def test_perturbed_attention_guidance_with_a_tuner_for_each_prompt(kind, guidance, components):
    pipe = enable_restune(kind.make(kind.plain, components[kind.is_xl]))
    pipe.load_tuner_weights(make_tuner(pipe.unet), "style")
    pipe.load_tuner_weights(make_tuner(pipe.unet, "bypass"), "other")
    mixes = ["style", None, {"style": -0.5, "other": 0.7}]
    together = draw(pipe, kind, count=3, guidance_scale=guidance, tuners=mixes)
    for number, mix in enumerate(mixes):
        alone = draw(pipe, kind, count=3, guidance_scale=guidance, tuners=[mix] * 3)[number]
        assert difference(together[number], alone) < 1e-4
    pipe.unload_tuner_weights()


def test_latent_consistency_models(components):
    parts = components[False]
    unet = sd_unet(time_cond_proj_dim=16)
    kind = Kind("LatentConsistencyModelPipeline", KINDS_BY_NAME["StableDiffusionPipeline"].inputs)
    plain = kind.make(LatentConsistencyModelPipeline, parts, unet=unet, scheduler=LCMScheduler())
    expected = draw(plain, kind)
    pipe = enable_restune(plain)
    pipe.load_tuner_weights(make_tuner(parts["unet"]), "style")
    tuned = draw(pipe, kind, count=2, tuners=["style", None])
    assert difference(tuned[:1], expected) > 1e-2
    pipe.unload_tuner_weights()
    assert difference(draw(pipe, kind, count=2)[1], tuned[1]) < 1e-4
    assert identical(draw(pipe, kind), expected)


@pytest.fixture(scope="module")
def animation(components):
    """A plain AnimateDiff pipeline, and how to draw with it."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        adapter = MotionAdapter(
            block_out_channels=components[False]["unet"].config.block_out_channels,
            motion_num_attention_heads=2,
            motion_norm_num_groups=8,
            motion_max_seq_length=8,
        )
        # The last layer of a motion module starts at zero.
        for name, parameter in adapter.named_parameters():
            if "proj_out" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    kind = Kind("AnimateDiffPipeline", lambda count: {"height": SIZE, "width": SIZE, "num_frames": 3})
    return kind.make(kind.plain, components[False], motion_adapter=adapter), kind


@pytest.mark.parametrize("part", TUNERS)
def test_a_tuner_of_the_images_base_acts_on_every_frame(part, animation, components):
    plain, kind = animation
    expected = draw(plain, kind)
    pipe = enable_restune(plain)
    pipe.load_tuner_weights(make_tuner(components[False]["unet"], part), "style")
    tuned = draw(pipe, kind)
    assert tuned.shape == (1, 4, 3, SIZE // 8, SIZE // 8)
    assert min(difference(tuned[:, :, frame], expected[:, :, frame]) for frame in range(3)) > 1e-2
    pipe.disable_tuners()
    assert identical(draw(pipe, kind), expected)
    pipe.unload_tuner_weights()
    assert identical(draw(pipe, kind), expected)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_videos_have_tuners_of_their_own(guidance, animation, components):
    plain, kind = animation
    pipe = enable_restune(plain)
    for part in ("skip", "bypass", "res inside attention"):
        pipe.load_tuner_weights(make_tuner(components[False]["unet"], part), part)
    mixes = ["skip", None, {"skip": -0.5, "bypass": 0.7, "res inside attention": 1.0}]
    together = draw(pipe, kind, count=3, guidance_scale=guidance, tuners=mixes)
    for number, mix in enumerate(mixes):
        alone = draw(pipe, kind, count=3, guidance_scale=guidance, tuners=[mix] * 3)[number]
        assert difference(together[number], alone) < 1e-4
    assert difference(together[0], together[1]) > 1e-2
    pipe.unload_tuner_weights()


def test_what_tuners_cannot_attach_to_is_refused(components):
    with pytest.raises(RestuneError, match="on a diffusers pipeline, but this is a UNet2DConditionModel"):
        enable_restune(components[False]["unet"])
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    with pytest.raises(RestuneError, match=r"Tuners attach to one of UNet2DConditionModel.*but this is a UNet2DModel"):
        enable_restune(DDPMPipeline(unet, DDPMScheduler()))

    class Unconditional(DiffusionPipeline):
        def __init__(self, scheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)

    with pytest.raises(RestuneError, match="a pipeline with a U-Net, but Unconditional has no U-Net loaded"):
        enable_restune(Unconditional(DDPMScheduler()))
