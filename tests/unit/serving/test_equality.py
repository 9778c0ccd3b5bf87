"""Any schedule of arrivals gives each request the image that the pipeline generates for it alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from restune_diffusion.serving import Engine, ImageRequest, Limits, TunerLibrary

from ...serving_base import (
    SCHEDULERS,
    STYLES,
    alone,
    assert_as_alone,
    gray,
    image,
    mask,
    run,
    small_pipeline,
    write_tuners,
)
from ...strategies_of_requests import requests


def test_every_scheduler_and_every_family_in_one_batch(reference, tuners, make_engine):
    engine = make_engine(max_rows=16)
    arrivals = [
        (
            number % 3,
            ImageRequest(
                f"a <dog> number {number}",
                seed=number,
                steps=3 + number % 3,
                guidance=3.0 if number % 2 else 1.0,
                scheduler=scheduler,
                tuners=((style, 0.75), ("other", 0.5)) if number % 3 == 0 else ((style, 1.0),),
            ),
        )
        for number, (scheduler, style) in enumerate(zip(SCHEDULERS, STYLES, strict=True))
    ]
    results = run(engine, arrivals)
    assert engine.stats().max_rows >= 8
    assert_as_alone(reference, tuners, results)
    bare = [alone(reference, tuners, ImageRequest("a <dog> number 1", seed=1, steps=4, guidance=3.0), 1)]
    # The tuners have an effect, or the comparison would show nothing.
    assert float((bare[0] - results[1].latents).abs().max()) > 0.01


def test_conditions_belong_to_their_own_request(reference, tuners, make_engine):
    control = (("control", 1.0),)
    results = run(
        make_engine(max_rows=16),
        [
            (0, ImageRequest("a", seed=1, steps=3, guidance=2.0, tuners=control, conditions=gray(255))),
            (1, ImageRequest("b", seed=2, steps=3, guidance=1.0, tuners=control, conditions=image())),
            (1, ImageRequest("c", seed=3, steps=4, guidance=2.0, tuners=(("skip", 1.0),))),
            (2, ImageRequest("d", seed=4, steps=2, tuners=(*control, ("lora", 0.5)), conditions=gray(90))),
        ],
    )
    assert_as_alone(reference, tuners, results)


@pytest.mark.parametrize("scheduler", ["euler", "lcm", "unipc"])
def test_images_to_start_from_and_to_repaint(reference, tuners, make_engine, scheduler):
    shared = {"steps": 5, "guidance": 2.0, "scheduler": scheduler, "image": image(), "tuners": (("bypass", 1.0),)}
    results = run(
        make_engine(max_rows=16),
        [
            (0, ImageRequest("a", seed=1, strength=0.6, **shared)),
            (0, ImageRequest("b", seed=2, strength=1.0, **{**shared, "guidance": 1.0})),
            (1, ImageRequest("c", seed=3, strength=0.7, mask=mask(), **shared)),
            (1, ImageRequest("d", seed=4, strength=1.0, mask=mask(), **shared)),
            (2, ImageRequest("e", seed=5, steps=3, scheduler=scheduler)),
        ],
    )
    assert_as_alone(reference, tuners, results)


def test_sizes_have_batches_of_their_own(reference, tuners, make_engine):
    results = run(
        make_engine(),
        [
            (0, ImageRequest("a", seed=1, steps=3)),
            (0, ImageRequest("b", seed=2, steps=3, width=64, height=48, tuners=(("skip", 1.0),))),
            (1, ImageRequest("c", seed=3, steps=3, width=48, height=64)),
            (1, ImageRequest("d", seed=4, steps=3, image=gray(200, 50, 41), width=64, height=48, strength=0.7)),
        ],
    )
    assert results[1].image.size == (64, 48)
    assert_as_alone(reference, tuners, results)


def test_a_base_for_inpainting(tmp_path):
    pipeline = small_pipeline(in_channels=9)
    write_tuners(pipeline, tmp_path)
    engine = Engine(pipeline, TunerLibrary(tmp_path), Limits(max_rows=8))
    results = run(
        engine,
        [
            (0, ImageRequest("a", seed=1, steps=3, image=image(), mask=mask(), strength=1.0, tuners=(("res", 1.0),))),
            (1, ImageRequest("b", seed=2, steps=4, guidance=1.0, image=gray(255), mask=mask(), strength=0.8)),
        ],
    )
    engine.close()
    assert_as_alone(pipeline, tmp_path, results)


def test_a_distilled_base_gets_the_guidance_as_an_input(tmp_path):
    pipeline = small_pipeline(time_cond_proj_dim=16)
    engine = Engine(pipeline, limits=Limits(max_rows=3))
    results = run(
        engine,
        [
            (0, ImageRequest("a", seed=1, steps=3, guidance=8.0, scheduler="lcm")),
            (1, ImageRequest("b", seed=2, steps=2, guidance=1.5, scheduler="lcm")),
            (1, ImageRequest("b", seed=2, steps=2, guidance=6.0, scheduler="lcm", image=image(), strength=0.9)),
        ],
    )
    # One row each, although their guidance is more than 1.
    assert engine.stats().max_rows == 3
    engine.close()
    assert_as_alone(pipeline, tmp_path, results)
    assert float((results[1].latents - results[2].latents).abs().max()) > 0.01


def test_the_image_is_that_of_the_pipeline(reference, make_engine):
    request = ImageRequest("a", seed=7, steps=2, guidance=2.0)
    (result,) = run(make_engine(), [(0, request)])
    generator = torch.Generator().manual_seed(7)
    expected = reference(
        "a", num_inference_steps=2, guidance_scale=2.0, width=32, height=32, generator=generator
    ).images[0]
    assert list(result.image.getdata()) == list(expected.getdata())


@settings(
    max_examples=4, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(arrivals=st.lists(st.tuples(st.integers(0, 6), requests()), min_size=1, max_size=5))
def test_any_schedule_of_arrivals(reference, tuners, make_engine, arrivals):
    engine = make_engine(max_rows=4, max_attached=4)
    results = run(engine, arrivals)
    engine.close()
    assert_as_alone(reference, tuners, results)
