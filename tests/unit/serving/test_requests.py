"""Requests and tickets: what is refused at construction, in one sentence."""

from __future__ import annotations

import subprocess
import sys

import pytest

from restune_diffusion.serving import ImageRequest, RequestCancelled, RequestFailed, RequestRefused, Ticket

from ...serving_base import gray


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 3}, "`prompt` must be a text"),
        ({"prompt": "x" * 10_001}, "10001 characters"),
        ({"negative_prompt": "\ud800"}, "surrogate"),
        ({"seed": -1}, "`seed` must be from 0"),
        ({"seed": 2**63}, "`seed` must be from 0"),
        ({"seed": True}, "must be an integer"),
        ({"width": 0}, "`width` must be from 1"),
        ({"height": 10**30}, "`height` must be from 1"),
        ({"steps": 0}, "`steps` must be from 1"),
        ({"steps": 3.0}, "must be an integer"),
        ({"guidance": float("nan")}, "`guidance` must be from 0"),
        ({"guidance": float("inf")}, "`guidance` must be from 0"),
        ({"guidance": "7"}, "`guidance` must be a number"),
        ({"strength": 1.5}, "`strength` must be from 0 to 1"),
        ({"scheduler": "best"}, "The scheduler `best` is unknown"),
        ({"scheduler": "x" * 100}, "longer than any name"),
        ({"tuners": "skip"}, "pairs of a name and a weight"),
        ({"tuners": (("skip",),)}, "pairs of a name and a weight"),
        ({"tuners": (("skip", float("nan")),)}, "weight of a tuner"),
        ({"tuners": (("skip", 1e9),)}, "weight of a tuner"),
        ({"tuners": ((3, 1.0),)}, "name of a tuner"),
        ({"tuners": (("skip", 1), ("skip", 0.5))}, "named twice"),
        ({"tuners": tuple((str(number), 1.0) for number in range(17))}, "16 at most"),
        ({"image": "cat.png"}, "`image` must be a PIL image"),
        ({"conditions": {"edge": "cat.png"}}, "must be a PIL image"),
        ({"conditions": {1: gray(1)}}, "keys of `conditions`"),
        ({"mask": gray(255)}, "A `mask` needs the `image`"),
        ({"image": gray(1), "strength": 0.1, "steps": 5}, "leaves none of the 5 steps; use at least 0.2"),
    ],
)
def test_invalid_values_are_refused_in_one_sentence(changes, message):
    with pytest.raises(RequestRefused, match=message) as refused:
        ImageRequest(**{"prompt": "a", **changes})
    assert len(str(refused.value)) < 400
    assert str(refused.value).endswith(".")


def test_tuners_may_be_a_mapping():
    request = ImageRequest("a", tuners={"skip": 1, "res": 0})
    assert request.tuners == (("skip", 1.0), ("res", 0.0))
    assert request.active_tuners == (("skip", 1.0),)


def test_requests_and_library_load_no_torch():
    code = (
        "import sys; from restune_diffusion.serving import ImageRequest, TunerLibrary, Limits, EngineStats, Ticket; "
        "ImageRequest('a', scheduler='euler'); assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_ticket_ends_once():
    ticket = Ticket(ImageRequest("a"), 1, 3)
    states: list[str] = []
    ticket.listen(lambda progress: states.append(progress.state))
    assert ticket._fail(RequestCancelled("first"))
    assert not ticket._fail(RequestFailed("second"))
    ticket._begin(5)
    assert states == ["waiting", "cancelled"]
    with pytest.raises(RequestCancelled, match="first"):
        ticket.result(0)
    with pytest.raises(TimeoutError, match=r"after 0\.01 seconds"):
        Ticket(ImageRequest("a"), 1, 3).result(0.01)
