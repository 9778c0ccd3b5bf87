import contextlib

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

from restune_diffusion import (
    RestuneError,
    RestuneLoaderMixin,
    RestuneStableDiffusionPipeline,
    RestuneStableDiffusionXLPipeline,
    Schedule,
    SkipConfig,
    Tuner,
    TunerNameError,
    TunerWeight,
)

from ...conftest import make_unet, randomize
from ...tiny_training import sdxl_pipeline

STEPS = 5
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler a": EulerAncestralDiscreteScheduler,
    "dpm++ 2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": LCMScheduler,
}
TUNERS = ["water", None, {"ink": 0.5}]


@pytest.fixture
def tuned(components):
    """A pipeline with small random models, on which two tuners are loaded."""
    unet = make_unet(cross_attention_dim=components["unet"].config.cross_attention_dim, sample_size=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=[8, 8],
            norm_num_groups=4,
        )
    pipe = RestuneStableDiffusionPipeline(**{**components, "unet": unet, "vae": vae}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    for seed, name in enumerate(["water", "ink"]):
        tuner = Tuner.for_base(unet, SkipConfig(ratio=0.5))
        randomize(tuner, seed, std=0.2)
        pipe.load_tuner_weights(tuner, name, weight=0.0)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def seeds(count):
    return [seeded(number) for number in range(count)]


def hook_count(pipe):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules())


def rows_of(pipe, action):
    """Count the rows that the U-Net computes in each of its calls."""
    rows = []
    handle = pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        action()
    finally:
        handle.remove()
    return rows


def alone(pipe, mix, share_steps, generator, trunk=None, **options):
    """Draw one branch in a call of its own: the trunk's tuners first, then the branch's, by schedules."""
    pipe.scheduler.set_timesteps(STEPS)
    steps = [float(step) for step in pipe.scheduler.timesteps]
    middle = 1 - (sum(steps[share_steps - 1 : share_steps + 1]) / 2 + 1) / 1000
    weights = {}
    for entry, piece in ((trunk, (0.0, middle)), (mix, (middle, 1.0))):
        mixes = {entry: 1.0} if isinstance(entry, str) else entry or {}
        for name, value in mixes.items():
            assert name not in weights
            weights[name] = TunerWeight(value, steps=Schedule(((*piece, 1.0, 1.0),)))
    pipe.set_tuners(weights)
    drawn = pipe(num_inference_steps=STEPS, generator=generator, output_type="latent", **options).images
    pipe.set_tuners([])
    return drawn


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_each_branch_is_what_its_schedule_of_weights_draws_alone(tuned, scheduler, guidance):
    tuned.scheduler = SCHEDULERS[scheduler].from_config(tuned.scheduler.config)
    options = {"prompt": "cat face", "guidance_scale": guidance}
    drawn = tuned.branches(
        tuners=TUNERS, share_steps=2, num_inference_steps=STEPS, generator=seeded(), output_type="latent", **options
    ).images
    expected = [alone(tuned, mix, 2, seeded(), **options)[0] for mix in TUNERS]
    for branch, image in zip(drawn, expected, strict=True):
        # Guidance and the sampler enlarge the last digits, in which batches of different sizes differ.
        torch.testing.assert_close(branch, image, rtol=0, atol=1e-4)
    assert (drawn[0] - drawn[1]).abs().max() > 1e-2
    assert (drawn[1] - drawn[2]).abs().max() > 1e-2


def test_without_common_steps_it_is_one_call_with_a_tuner_for_each_row(tuned):
    latents = torch.randn(1, tuned.unet.config.in_channels, 8, 8, generator=seeded())
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
    branches = tuned.branches("sun", TUNERS, latents=latents, **options).images
    rows = tuned(["sun"] * 3, tuners=TUNERS, latents=latents.repeat(3, 1, 1, 1), **options).images
    torch.testing.assert_close(branches, rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trunk", [None, "water"])
def test_with_all_steps_in_common_the_branches_are_one_image(tuned, trunk):
    options = {"num_inference_steps": 3, "output_type": "latent"}
    branches = tuned.branches("sun", TUNERS, 3, trunk=trunk, generator=seeded(), **options).images
    (expected,) = tuned("sun", tuners=[trunk], generator=seeded(), **options).images
    for branch in branches:
        assert torch.equal(branch, branches[0])
        torch.testing.assert_close(branch, expected, rtol=0, atol=1e-4)


def test_a_tuner_may_draw_the_trunk(tuned):
    options = {"prompt": "house", "guidance_scale": 2.0}
    drawn = tuned.branches(
        tuners=["ink", None], share_steps=3, trunk="water", num_inference_steps=STEPS, generator=seeded(),
        output_type="latent", **options,
    ).images  # fmt: skip
    for branch, mix in zip(drawn, ["ink", None], strict=True):
        (expected,) = alone(tuned, mix, 3, seeded(), trunk="water", **options)
        torch.testing.assert_close(branch, expected, rtol=0, atol=1e-4)


def test_every_image_of_every_prompt_branches(tuned):
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"}
    drawn = tuned.branches(
        ["sun", "cat face"], ["water", None], 1, num_images_per_prompt=2, generator=seeds(4),
        **options,
    ).images  # fmt: skip
    assert len(drawn) == 8
    for number, prompt in enumerate(["sun", "sun", "cat face", "cat face"]):
        pair = tuned.branches(prompt, ["water", None], 1, generator=seeded(number), **options).images
        torch.testing.assert_close(drawn[2 * number : 2 * number + 2], pair, rtol=0, atol=1e-4)


def test_sdxl_branches_too():
    pipe = RestuneStableDiffusionXLPipeline(**sdxl_pipeline().components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    tuner = Tuner.for_base(pipe.unet, SkipConfig(ratio=0.5))
    randomize(tuner, std=0.2)
    pipe.load_tuner_weights(tuner, "water", weight=0.0)
    options = {"guidance_scale": 3.0}
    drawn = []
    rows = rows_of(
        pipe,
        lambda: drawn.extend(
            pipe.branches(
                ["sun", "house"], ["water", None], 2, num_inference_steps=STEPS, generator=seeds(2),
                output_type="latent", **options,
            ).images
        ),
    )  # fmt: skip
    assert rows == [4, 4, 8, 8, 8]
    for number, prompt in enumerate(["sun", "house"]):
        for branch, mix in enumerate(["water", None]):
            expected = alone(pipe, mix, 2, seeded(number), prompt=prompt, **options)[0]
            torch.testing.assert_close(drawn[2 * number + branch], expected, rtol=0, atol=1e-4)
        assert (drawn[2 * number] - drawn[2 * number + 1]).abs().max() > 1e-3


def test_the_trunk_costs_one_row_for_each_image(tuned):
    options = {"num_inference_steps": 4, "generator": seeded(), "output_type": "latent"}
    prompts = ["sun", "house"]
    assert rows_of(tuned, lambda: tuned.branches(prompts, TUNERS, 3, **options)) == [4, 4, 4, 12]
    assert rows_of(tuned, lambda: tuned.branches(prompts, TUNERS, 0, **options)) == [12] * 4
    assert rows_of(tuned, lambda: tuned.branches("sun", TUNERS, 4, guidance_scale=1, **options)) == [1] * 4


def test_a_step_of_second_order_is_one_step(tuned):
    tuned.scheduler = HeunDiscreteScheduler.from_config(tuned.scheduler.config)
    options = {"num_inference_steps": 4, "guidance_scale": 1, "generator": seeded(), "output_type": "latent"}
    assert rows_of(tuned, lambda: tuned.branches("sun", TUNERS, 2, **options)) == [1, 1, 1, 1, 3, 3, 3]


def test_a_tuner_for_one_half_of_guidance_keeps_to_it_in_the_trunk(tuned):
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    tuned.set_tuners({"water": TunerWeight(on="uncond")})
    trunk = tuned.branches(["sun", "house"], [None, "water"], 2, trunk="water", generator=seeds(2), **options).images
    plain = tuned(["sun", "house"], generator=seeds(2), **options).images
    torch.testing.assert_close(trunk[::2], plain, rtol=0, atol=1e-4)
    tuned.set_tuners("water")
    both = tuned(["sun", "house"], generator=seeds(2), **options).images
    assert (both - plain).abs().max() > 0.1


def test_a_generator_serves_as_in_a_call_without_branches(tuned):
    tuned.scheduler = EulerAncestralDiscreteScheduler.from_config(tuned.scheduler.config)
    options = {"num_inference_steps": 2, "output_type": "latent"}
    branched, plain = seeded(), seeded()
    for _ in range(2):
        branches = tuned.branches("sun", ["water", None], 1, generator=branched, **options).images
        torch.testing.assert_close(branches[1:], tuned("sun", generator=plain, **options).images, rtol=0, atol=1e-4)
    torch.manual_seed(3)
    first = tuned.branches(["sun", "sun"], ["water", None], 1, **options).images
    torch.manual_seed(3)
    torch.testing.assert_close(tuned.branches(["sun", "sun"], ["water", None], 1, **options).images, first)
    assert (first[1] - first[3]).abs().max() > 0.1


def test_it_leaves_no_trace_also_after_an_error(tuned):
    tuned.set_tuners({"water": 0.3})
    hooks, weights = hook_count(tuned), tuned.get_list_tuners()

    def fail(pipe, step, timestep, tensors):
        raise KeyError(step)

    for callback, common in ((None, 1), (fail, 1), (fail, 2), (fail, 0)):
        with pytest.raises(KeyError) if callback else contextlib.nullcontext():
            tuned.branches("sun", TUNERS, common, num_inference_steps=2, callback_on_step_end=callback)
        assert hook_count(tuned) == hooks
        assert tuned.get_list_tuners() == weights
    tuned.unload_tuner_weights()
    tuned.branches("sun", [None, None], 1, num_inference_steps=2, output_type="latent")
    assert hook_count(tuned) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tuners": []}, RestuneError, "no branches"),
        ({"tuners": ["water", "oil"]}, TunerNameError, "'oil'"),
        ({"tuners": ["water"], "trunk": "oil"}, TunerNameError, "'oil'"),
        ({"tuners": ["water"], "share_steps": 4}, RestuneError, "between 0 and 3, the number of denoising steps"),
        ({"tuners": ["water"], "share_steps": -1}, RestuneError, "between 0 and 3, the number of denoising steps"),
        ({"tuners": ["water"], "generator": [torch.Generator()] * 2}, RestuneError, "2 generators for 1 images"),
        ({"tuners": ["water"], "latents": torch.zeros(2, 4, 8, 8)}, RestuneError, "2 latents for 1 images"),
    ],
)
def test_bad_arguments_are_named(tuned, arguments, error, message):
    with pytest.raises(error, match=message):
        tuned.branches("sun", num_inference_steps=3, **arguments)


def test_unequal_branches_are_refused(tuned):
    def disturb(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] + torch.arange(3.0)[:, None, None, None]}

    with pytest.raises(RestuneError, match="same noise"):
        tuned.branches("sun", TUNERS, 2, num_inference_steps=2, callback_on_step_end=disturb)


def with_tuners(kind, pipe, **components):
    made = type("Pipeline", (RestuneLoaderMixin, kind), {})(
        **{**pipe.components, **components}, requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    return made


def picture(color, size):
    image = Image.new("RGB", (size, size), color)
    image.paste((20, 20, 20), (size // 4, size // 4, size // 2, size // 2))
    return image


@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def test_branches_from_an_image_share_it_and_its_noise(tuned, kind):
    made = with_tuners(kind, tuned)
    made.scheduler = EulerAncestralDiscreteScheduler.from_config(made.scheduler.config)
    size = made.unet.config.sample_size * made.vae_scale_factor
    options = {"num_inference_steps": 4, "strength": 0.8, "guidance_scale": 2.0, "output_type": "latent"}
    images = [picture(color, size) for color in ("red", "blue")]
    if kind is StableDiffusionInpaintPipeline:
        options["mask_image"] = picture("white", size).convert("L")
    prompts = ["sun", "house"]
    drawn = made.branches(prompts, ["water", None], 2, image=images, generator=seeds(2), **options).images
    for number, prompt in enumerate(prompts):
        (plain,) = made(prompt, image=images[number], generator=seeded(number), **options).images
        torch.testing.assert_close(drawn[2 * number + 1], plain, rtol=0, atol=1e-4)
        assert (drawn[2 * number] - plain).abs().max() > 1e-2


def test_a_control_network_runs_one_row_in_the_trunk_too(tuned):
    controlnet = ControlNetModel.from_unet(tuned.unet, conditioning_embedding_out_channels=(16, 32)).eval()
    for layer in controlnet.controlnet_down_blocks:
        torch.nn.init.normal_(layer.weight, std=0.1, generator=seeded())
    made = with_tuners(StableDiffusionControlNetPipeline, tuned, controlnet=controlnet)
    size = made.unet.config.sample_size * made.vae_scale_factor
    options = {"image": picture("red", size), "num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"}
    rows = []
    controlnet.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    drawn = made.branches("sun", ["water", None], 2, generator=seeded(), **options).images
    assert rows == [2, 2, 4]
    (plain,) = made("sun", generator=seeded(), **options).images
    torch.testing.assert_close(drawn[1], plain, rtol=0, atol=1e-4)
    assert (drawn[0] - plain).abs().max() > 2e-3
    assert not controlnet._forward_hooks
