"""Any schedule of arrivals gives each request the image that the pipeline generates for it alone: more examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from restune_diffusion.serving import Engine, ImageRequest, Limits, TunerLibrary

from ...serving_base import assert_as_alone, image, mask, run, small_pipeline, small_xl_pipeline, write_tuners
from ...strategies_of_requests import requests


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """The base of the engine, the same base without an engine, and the folder of the tuners."""
    folder = tmp_path_factory.mktemp("tuners")
    base = small_pipeline()
    write_tuners(base, folder)
    return base, small_pipeline(), folder


@settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 8), requests()), min_size=2, max_size=8),
    max_rows=st.sampled_from([2, 5, 16]),
)
def test_any_schedule_of_arrivals(pipelines, arrivals, max_rows):
    base, reference, folder = pipelines
    engine = Engine(base, TunerLibrary(folder), Limits(max_rows=max_rows, max_attached=4))
    try:
        results = run(engine, arrivals)
    finally:
        engine.close()
    assert_as_alone(reference, folder, results)


def test_stable_diffusion_xl(tmp_path):
    pipeline = small_xl_pipeline()
    write_tuners(pipeline, tmp_path)
    engine = Engine(pipeline, TunerLibrary(tmp_path), Limits(max_rows=12))
    results = run(
        engine,
        [
            (0, ImageRequest("a", seed=1, steps=3, guidance=4.0, tuners=(("skip", 1.0),))),
            (0, ImageRequest("b", negative_prompt="c", seed=2, steps=2, guidance=4.0, scheduler="euler")),
            (1, ImageRequest("d <dog>", seed=3, steps=2, guidance=1.0, tuners=(("words", 1.0),))),
            (1, ImageRequest("e", seed=4, steps=4, image=image(), strength=0.5, tuners=(("lora", 1.0),))),
            (1, ImageRequest("f", seed=5, steps=4, image=image(), mask=mask(), strength=0.8)),
        ],
    )
    engine.close()
    assert_as_alone(pipeline, tmp_path, results)
