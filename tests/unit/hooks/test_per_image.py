from dataclasses import replace

import numpy as np
import pytest
import torch

from restune_diffusion import (
    BypassConfig,
    ControlConfig,
    ResConfig,
    RestuneError,
    SkipConfig,
    Tuner,
    TunerManager,
    TunerNameError,
    TunerWeight,
    attach,
    schedule,
)

from ...conftest import make_inputs, randomize
from .test_attachment import run, trained

CONFIGS = {
    "skip": SkipConfig(ratio=0.5),
    "bypass": BypassConfig(ratio=0.25),
    "res": ResConfig(
        self_attention="prefix",
        cross_attention="adapter",
        feed_forward="lora",
        block="attention",
        gate="exact",
        width=8,
    ),
}


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_each_row_gets_its_own_mix(unet, copies):
    latents, timestep, text = make_inputs(batch=3)
    tuners = {name: trained(unet, config, seed) for seed, (name, config) in enumerate(CONFIGS.items())}
    for name, tuner in tuners.items():
        attach(unet, tuner, name)
    manager = TunerManager.of(unet)
    mixes = [{"skip": 0.7, "res": 0.3}, {}, {"skip": -0.5, "bypass": 1.0, "res": -0.5}]
    alone = []
    for image, mix in enumerate(mixes):
        manager.set_weights(mix)
        rows = [latents[image : image + 1], timestep, text[image : image + 1]]
        alone.append(run(unet, rows))
    manager.set_weights({name: [mix.get(name, 0.0) for mix in mixes] for name in tuners})
    together = run(unet, (latents.repeat(copies, 1, 1, 1), timestep, text.repeat(copies, 1, 1)))
    torch.testing.assert_close(together, torch.cat(alone * copies), rtol=0, atol=1e-5)


def test_only_the_rows_with_a_weight_are_run(unet):
    latents, timestep, text = make_inputs(batch=4)
    tuner = trained(unet, SkipConfig())
    seen = []
    tuner.get_submodule("skip.skip.0").register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[0]))
    with attach(unet, tuner, weight=[0.0, 1.0, 0.0, 0.5]):
        run(unet, (latents, timestep, text))
        TunerManager.of(unet).set_weights({"default": [0.0, 0.0, 0.0, 0.0]})
        assert TunerManager.of(unet).active_names == []
        run(unet, (latents, timestep, text))
    assert seen == [2]


def test_a_batch_that_the_weights_do_not_fit_is_refused(unet):
    with (
        attach(unet, trained(unet, SkipConfig()), weight=[1.0, 0.5, 0.2]),
        pytest.raises(RestuneError, match=r"for 3 images, but the batch has 2 rows"),
    ):
        run(unet, make_inputs(batch=2))


@pytest.mark.parametrize("weight", [[], [1.0, float("nan")], float("inf")])
def test_a_refused_weight_changes_nothing(unet, weight):
    attach(unet, trained(unet, SkipConfig()), "a", 0.3)
    attach(unet, trained(unet, SkipConfig()), "b", 0.4)
    with pytest.raises(RestuneError, match="finite"):
        TunerManager.of(unet).set_weights({"a": 1.0, "b": weight})
    assert TunerManager.of(unet).weights == {"a": 0.3, "b": 0.4}


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_one_call_draws_each_prompt_with_its_own_tuner(pipe, guidance):
    for seed, (name, config) in enumerate(CONFIGS.items()):
        tuner = Tuner.for_base(pipe.unet, config)
        randomize(tuner, seed, std=0.05)
        pipe.load_tuner_weights(tuner, name)
    pipe.set_tuners("skip", 0.25)
    prompts = ["cat face", "red heart", "sun", "house"]
    mixes = ["skip", None, {"bypass": 0.5, "res": 0.3}, {"skip": 0.5, "res": 1.0}]

    def draw(prompts, tuners):
        generators = [torch.Generator().manual_seed(0) for _ in prompts]
        return pipe(
            prompts,
            num_inference_steps=2,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
            tuners=tuners,
        ).images

    together = draw(prompts, mixes)
    for number, (prompt, mix) in enumerate(zip(prompts, mixes, strict=True)):
        # The base itself differs by 3e-6 between batches of different sizes.
        np.testing.assert_allclose(together[number], draw([prompt], [mix])[0], rtol=0, atol=1e-5)
        if mix is not None:
            assert abs(together[number] - draw([prompt], [None])[0]).max() > 1e-2
    assert pipe.get_list_tuners() == {"skip": 0.25, "bypass": 0.0, "res": 0.0}


def test_what_set_tuners_said_of_sites_and_steps_holds_for_each_image(pipe):
    tuner = Tuner.for_base(pipe.unet, CONFIGS["skip"])
    randomize(tuner, std=0.05)
    pipe.load_tuner_weights(tuner, "skip")

    def draw(**kwargs):
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        return pipe(["sun"] * 2, num_inference_steps=2, generator=generators, output_type="np", **kwargs).images

    full = draw(tuners=["skip", None])
    setting = TunerWeight(0.9, {"skip.0-5": 0.0}, schedule("0-0.6: 1"), on="cond")
    pipe.set_tuners({"skip": setting})
    some = draw(tuners=["skip", None])
    assert pipe.get_list_tuners() == {"skip": setting}
    pipe.set_tuners({"skip": replace(setting, value=1.0)})
    np.testing.assert_allclose(some[0], draw()[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(some[1], full[1], rtol=0, atol=1e-5)
    assert abs(some[0] - full[0]).max() > 1e-2
    assert abs(some[0] - some[1]).max() > 1e-3


@pytest.mark.parametrize("copies", [1, 2])
def test_each_row_has_its_own_condition_image(unet, copies):
    latents, timestep, text = make_inputs(batch=2)
    tuner = trained(unet, ControlConfig(conditions=("edges", "colours"), ratio=0.25))
    images = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with attach(unet, tuner), torch.no_grad():
        manager = TunerManager.of(unet)
        alone = []
        for row in range(2):
            manager.set_conditions("default", [images[0, row : row + 1], images[1, :1]], [0.5, 1.0])
            alone.append(run(unet, (latents[row : row + 1], timestep, text[row : row + 1])))
        # The second condition is one image for all rows.
        manager.set_conditions("default", [images[0], images[1, :1]], [0.5, 1.0])
        together = run(unet, (latents.repeat(copies, 1, 1, 1), timestep, text.repeat(copies, 1, 1)))
    torch.testing.assert_close(together, torch.cat(alone * copies), rtol=0, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-2


def test_a_prompts_tuner_acts_on_all_of_its_images(pipe, files):
    pipe.load_tuner_weights(files / "water.safetensors")
    options = {"num_inference_steps": 2, "num_images_per_prompt": 2, "output_type": "np"}

    def draw(**kwargs):
        return pipe(["sun", "sun"], **options, **kwargs, generator=torch.Generator().manual_seed(0)).images

    tuned, mixed = draw(), draw(tuners=["water", None])
    pipe.disable_tuners()
    plain = draw()
    np.testing.assert_allclose(mixed[:2], tuned[:2], rtol=0, atol=5e-4)
    np.testing.assert_allclose(mixed[2:], plain[2:], rtol=0, atol=5e-4)


def test_an_error_leaves_the_mix_as_it_was(pipe, files):
    pipe.load_tuner_weights(files / "water.safetensors", weight=0.5)
    with pytest.raises(TunerNameError, match="'oil'"):
        pipe(["sun"], tuners=["oil"])
    with pytest.raises(RestuneError, match="3 entries in `tuners` for 1 prompts"):
        pipe(["sun"], tuners=["water"] * 3, num_inference_steps=2)
    assert pipe.get_list_tuners() == {"water": 0.5}
