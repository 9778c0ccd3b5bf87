"""Pictures steered by images: the arguments of a pipeline's call, and what reaches the base."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from restune_diffusion import (
    ConditionError,
    ControlConfig,
    RestuneStableDiffusionPipeline,
    SkipConfig,
    Tuner,
    TunerManager,
)
from restune_diffusion.hooks.attachment import attach
from restune_diffusion.tuners import CascadeEncoder

from ...conftest import make_inputs, make_unet, randomize
from ...tiny_pipelines import KINDS, difference, identical, sd_components, sdxl_components
from ...tiny_pipelines import draw as draw_kind
from ...tiny_training import draw_image, sd_pipeline

RED, BLUE = draw_image("red", (16, 16)), draw_image("blue", (16, 16))


@pytest.fixture(scope="module")
def parts():
    return sd_pipeline().components


@pytest.fixture
def pipe(parts):
    pipe = RestuneStableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    pipe.unload_tuner_weights()


def load(pipe, name, *configs, seed=0):
    tuner = Tuner.for_base(pipe.unet, *configs).requires_grad_(False)
    randomize(tuner, seed)
    pipe.load_tuner_weights(tuner, name)
    return tuner


def draw(pipe, prompt="a disc", **options):
    count = len(prompt) if isinstance(prompt, list) else 1
    generators = [
        torch.Generator().manual_seed(seed) for seed in range(count * options.get("num_images_per_prompt", 1))
    ]
    return pipe(prompt, num_inference_steps=2, generator=generators, output_type="np", **options).images


def as_tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


def test_an_image_steers_and_nothing_of_it_stays(pipe):
    plain = draw(pipe)
    load(pipe, "sketch", ControlConfig())
    red = draw(pipe, tuner_image=RED)
    assert np.abs(red - draw(pipe, tuner_image=BLUE)).max() > 1e-4
    assert np.abs(red - plain).max() > 1e-4
    assert np.array_equal(draw(pipe, tuner_image=RED), red)
    assert not TunerManager.of(pipe.unet).has_conditions("sketch")
    pipe.set_tuners("sketch", 0.0)
    assert np.array_equal(draw(pipe), plain)
    assert np.array_equal(draw(pipe, tuner_image=RED), plain)
    pipe.set_tuners("sketch")
    pipe.disable_tuners()
    assert np.array_equal(draw(pipe, tuner_image=RED), plain)


def test_every_kind_of_image_means_the_same(pipe):
    load(pipe, "sketch", ControlConfig())
    expected = draw(pipe, tuner_image=RED)
    array = np.asarray(RED)
    for same in ([RED], array, array / np.float32(255), as_tensor(RED), as_tensor(RED)[None], {"condition": RED}):
        np.testing.assert_allclose(draw(pipe, tuner_image=same), expected, atol=1e-5)
    np.testing.assert_allclose(draw(pipe, tuner_image={"sketch": RED}), expected, atol=1e-5)


def test_each_prompt_has_its_image(pipe):
    load(pipe, "sketch", ControlConfig())
    prompts = ["a disc", "a ring"]
    both = draw(pipe, prompts, tuner_image=[RED, BLUE])
    for number, image in enumerate((RED, BLUE)):
        alone = draw(pipe, prompts, tuner_image=image)
        np.testing.assert_allclose(both[number], alone[number], atol=1e-5)
    doubled = draw(pipe, prompts, tuner_image=[RED, BLUE], num_images_per_prompt=2)
    for number, image in enumerate((RED, RED, BLUE, BLUE)):
        alone = draw(pipe, prompts, tuner_image=image, num_images_per_prompt=2)
        np.testing.assert_allclose(doubled[number], alone[number], atol=1e-5)


def test_a_control_tuner_can_act_on_one_of_the_prompts_alone(pipe):
    plain = draw(pipe, ["a disc", "a ring"])
    load(pipe, "sketch", ControlConfig())
    mixed = draw(pipe, ["a disc", "a ring"], tuners=[None, "sketch"], tuner_image=RED)
    np.testing.assert_allclose(mixed[0], plain[0], atol=1e-5)
    assert np.abs(mixed[1] - plain[1]).max() > 1e-4


@pytest.mark.parametrize("trunk", [None, "sketch"])
def test_branches_are_steered(pipe, trunk):
    load(pipe, "sketch", ControlConfig())
    load(pipe, "style", SkipConfig(), seed=1)
    prompts, options = ["a disc", "a ring"], {"num_inference_steps": 3, "output_type": "np"}

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(2)]

    drawn = pipe.branches(
        prompts,
        ["sketch", "style"],
        1,
        trunk=trunk,
        tuner_image=[RED, BLUE],
        generator=generators(),
        **options,
    ).images
    for number, image in enumerate((RED, BLUE)):
        alone = pipe.branches(
            prompts,
            ["sketch", "style"],
            1,
            trunk=trunk,
            tuner_image=image,
            generator=generators(),
            **options,
        ).images
        np.testing.assert_allclose(drawn[2 * number : 2 * number + 2], alone[2 * number : 2 * number + 2], atol=1e-5)
        assert np.abs(drawn[2 - 2 * number] - alone[2 - 2 * number]).max() > 1e-4
    assert not TunerManager.of(pipe.unet).has_conditions("sketch")


def test_scales_weigh_the_conditions(pipe):
    load(pipe, "sketch", ControlConfig(conditions=("edges", "colours")))
    images = {"edges": RED, "colours": BLUE}
    alone = draw(pipe, tuner_image={"edges": RED})
    np.testing.assert_allclose(
        draw(pipe, tuner_image=images, tuner_conditioning_scale={"colours": 0.0}), alone, atol=1e-6
    )
    assert np.abs(draw(pipe, tuner_image=images) - alone).max() > 1e-4
    whole = draw(pipe, tuner_image=images, tuner_conditioning_scale=0.5)
    named = draw(pipe, tuner_image=images, tuner_conditioning_scale={"edges": 0.5, "colours": 0.5})
    assert np.array_equal(whole, named)
    assert np.abs(whole - draw(pipe, tuner_image=images)).max() > 1e-5


def test_two_control_tuners_share_a_condition_of_one_name(pipe):
    load(pipe, "one", ControlConfig(conditions=("canny",)))
    load(pipe, "two", ControlConfig(conditions=("canny", "mask")), seed=1)
    shared = draw(pipe, tuner_image={"canny": RED, "mask": BLUE})
    apart = draw(pipe, tuner_image={"one": RED, "two": {"canny": RED, "mask": BLUE}})
    assert np.array_equal(shared, apart)
    other = draw(pipe, tuner_image={"canny": RED, "mask": BLUE, "one": BLUE})
    assert np.array_equal(other, draw(pipe, tuner_image={"one": BLUE, "two": {"canny": RED, "mask": BLUE}}))
    assert np.abs(other - shared).max() > 1e-4


def test_a_style_tuner_acts_beside_on_the_same_skips():
    unet, inputs = make_unet(), make_inputs()
    control, style = Tuner.for_base(unet, ControlConfig()), Tuner.for_base(unet, SkipConfig())
    both = Tuner.for_base(unet, ControlConfig(), SkipConfig())
    randomize(control, 1)
    randomize(style, 2)
    both.load_state_dict({**control.state_dict(), **style.state_dict()})
    image = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with attach(unet, control, "control"), attach(unet, style, "style"):
            TunerManager.of(unet).set_conditions("control", [image])
            apart = unet(*inputs).sample
        with attach(unet, both, "both"):
            TunerManager.of(unet).set_conditions("both", [image])
            together = unet(*inputs).sample
        with attach(unet, style, "style"):
            alone = unet(*inputs).sample
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
    assert (together - alone).abs().max() > 1e-3


def count_encodings(monkeypatch):
    calls = []
    forward = CascadeEncoder.forward
    monkeypatch.setattr(CascadeEncoder, "forward", lambda self, image: calls.append(1) or forward(self, image))
    return calls


def test_an_image_is_encoded_once_for_a_generation(pipe, monkeypatch):
    load(pipe, "sketch", ControlConfig())
    calls = count_encodings(monkeypatch)
    draw(pipe, tuner_image=RED)
    assert len(calls) == 1


def test_in_training_an_image_is_encoded_once_for_a_pass_and_never_remembered(monkeypatch):
    unet, inputs = make_unet(), make_inputs()
    tuner = Tuner.for_base(unet, ControlConfig())
    randomize(tuner)
    calls = count_encodings(monkeypatch)
    with attach(unet, tuner):
        TunerManager.of(unet).set_conditions("default", [torch.rand(2, 3, 128, 128)])
        first = unet(*inputs).sample
        first.square().mean().backward()
        assert all(parameter.grad is not None for parameter in tuner.parameters())
        assert len(calls) == 1
        # nothing of the pass is held, so that the base can be copied
        assert TunerManager.of(copy.deepcopy(unet)).has_conditions("default")
        with torch.no_grad():
            for parameter in tuner.get_submodule("control.encoders").parameters():
                parameter.mul_(2)
            second = unet(*inputs).sample
    assert len(calls) == 2
    assert (second - first).abs().max() > 1e-3


def test_another_picture_size_is_encoded_anew():
    unet = make_unet()
    tuner = Tuner.for_base(unet, ControlConfig()).requires_grad_(False)
    randomize(tuner)
    with torch.no_grad(), attach(unet, tuner):
        TunerManager.of(unet).set_conditions("default", [torch.rand(1, 3, 128, 128)])
        assert unet(*make_inputs(size=16)).sample.shape[-1] == 16
        assert unet(*make_inputs(size=24)).sample.shape[-1] == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "The tuner 'sketch' needs an image for 'canny' or 'mask'; give one as tuner_image"),
        ({"tuner_image": RED}, r"take several conditions; give a mapping by name: \{'canny': ..., 'mask': ...\}"),
        ({"tuner_image": {"depth": RED}}, "No active tuner has a condition 'depth'; available: canny, mask"),
        ({"tuner_image": {"canny": "a.png"}}, "'canny' must be a PIL image, an array or a tensor, but is a str"),
        (
            {"tuner_image": {"canny": torch.zeros(1, 8, 8)}},
            r"'canny' must have 3 channels, but its shape is \(1, 8, 8\)",
        ),
        ({"tuner_image": {"canny": as_tensor(RED) * 2 - 1}}, "floating point with values from 0 to 1"),
        ({"tuner_image": {"canny": as_tensor(RED) * torch.nan}}, "floating point with values from 0 to 1"),
        ({"tuner_image": {"canny": [RED] * 3}}, "There are 3 images for 'canny' and 1 prompts"),
        ({"tuner_image": {"canny": [RED, RED.resize((8, 8))]}}, "must be one or more images of the same size"),
        ({"tuner_image": {"canny": []}}, "must be one or more images of the same size"),
        (
            {"tuner_image": {"canny": RED}, "tuner_conditioning_scale": {"x": 1.0}},
            "No active tuner has a condition 'x'",
        ),
        ({"tuner_image": {"canny": RED}, "tuner_conditioning_scale": float("nan")}, "must be a finite number"),
    ],
)
def test_wrong_images_are_refused_in_a_sentence(pipe, options, message):
    load(pipe, "sketch", ControlConfig(conditions=("canny", "mask")))
    with pytest.raises(ConditionError, match=message):
        draw(pipe, **options)
    assert not TunerManager.of(pipe.unet).has_conditions("sketch")


def test_an_image_for_nobody_is_refused(pipe):
    with pytest.raises(ConditionError, match="no tuner is loaded"):
        draw(pipe, tuner_image=RED)
    load(pipe, "style", SkipConfig())
    with pytest.raises(ConditionError, match="No loaded tuner takes a condition image"):
        draw(pipe, tuner_image=RED)


def test_images_given_to_the_manager_stay_until_cleared(pipe):
    load(pipe, "sketch", ControlConfig())
    manager = TunerManager.of(pipe.unet)
    manager.set_conditions("sketch", [as_tensor(RED)[None]])
    assert np.abs(draw(pipe) - draw(pipe, tuner_image=RED)).max() < 1e-6
    assert np.abs(draw(pipe) - draw(pipe, tuner_image=BLUE)).max() > 1e-4
    manager.clear_conditions()
    with pytest.raises(ConditionError, match="needs an image"):
        draw(pipe)


def test_one_image_too_many_for_the_batch_is_told(pipe):
    unet, inputs = make_unet(), make_inputs(batch=4)
    tuner = Tuner.for_base(unet, ControlConfig())
    with attach(unet, tuner):
        TunerManager.of(unet).set_conditions("default", [torch.rand(3, 3, 128, 128)])
        with pytest.raises(ConditionError, match="There are 3 condition images for 4 images"):
            unet(*inputs)


def test_a_picture_of_another_size_than_the_image(pipe):
    load(pipe, "sketch", ControlConfig())
    wide = draw(pipe, tuner_image=Image.new("RGB", (40, 70), "red"), width=32, height=16)
    assert wide.shape[1:3] == (16, 32)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.removesuffix("Pipeline"))
def test_every_pipeline_is_steered_beside_its_own_images(kind):
    components = sdxl_components() if kind.is_xl else sd_components()
    pipe = kind.make(kind.ours, components)
    plain = draw_kind(pipe, kind)
    load(pipe, "sketch", ControlConfig())
    red, blue = (draw_kind(pipe, kind, tuner_image=flat) for flat in (RED, BLUE))
    assert difference(red, blue) > 1e-4
    assert difference(red, plain) > 1e-4
    pipe.set_tuners("sketch", 0.0)
    assert identical(draw_kind(pipe, kind), plain)


def test_a_compiled_unet_gets_features_that_are_encoded_before_it_runs(pipe, monkeypatch):
    load(pipe, "sketch", ControlConfig())
    attached = TunerManager.of(pipe.unet)._tuners["sketch"]
    expected = [draw(pipe, tuner_image=image) for image in (RED, BLUE)]
    found, memory = [], []

    def look(module, args, kwargs):
        encoded = attached.conditions.encoded
        memory.append(None if encoded is None else [level.data_ptr() for level in encoded[0].values()])

    handle = pipe.unet.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
    draw(pipe, tuner_image=RED)
    assert memory[0] is None
    memory.clear()
    monkeypatch.setattr("restune_diffusion.pipelines.loaders.is_compiled", lambda unet: True)
    for image in (RED, BLUE):
        found.append(draw(pipe, tuner_image=image))
    handle.remove()
    assert np.array_equal(found, expected)
    assert memory[0] is not None
    assert all(each == memory[0] for each in memory)
