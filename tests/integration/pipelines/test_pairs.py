"""A tuner with one other extension: both have an effect, and removing one leaves the other exactly unchanged."""

from __future__ import annotations

import itertools

import pytest

from restune_diffusion import enable_restune

from ...peers import freeu, ip_adapter, lora, nothing
from ...tiny_pipelines import (
    KINDS_BY_NAME,
    TUNERS,
    detach_all,
    difference,
    draw,
    identical,
    make_tuner,
    sd_components,
    sdxl_components,
)

# The task in a pipeline class's name, and the setup of an instance.
PEERS = {
    "ControlNet": ("ControlNet", nothing),
    "IP-Adapter": ("", ip_adapter),
    "LoRA": ("", lora),
    "PAG": ("PAG", nothing),
    "FreeU": ("", freeu),
}


@pytest.fixture(scope="module")
def made():
    return {"": sd_components(), "XL": sdxl_components()}


@pytest.fixture
def components(made):
    yield made
    for parts in made.values():
        detach_all(parts["unet"])


@pytest.mark.parametrize("size", ["", "XL"], ids=["SD", "SDXL"])
@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("peer", PEERS)
def test_a_pair(peer, tuner, size, components):
    parts = {**components[size], "pag_applied_layers": ["down", "up"]}
    task, setup = PEERS[peer]
    kind, text_to_image = (KINDS_BY_NAME[f"StableDiffusion{size}{task}Pipeline"] for task in (task, ""))
    without_peer = text_to_image.make(text_to_image.ours, parts)
    neither = draw(without_peer, text_to_image)
    plain = kind.make(kind.plain, parts)
    with setup(plain, kind) as arguments:
        peer_alone = draw(plain, kind, **arguments)
    without_peer.load_tuner_weights(make_tuner(parts["unet"], tuner), "tuner")
    tuner_alone = draw(without_peer, text_to_image)

    pipe = enable_restune(kind.make(kind.plain, parts))
    with setup(pipe, kind) as arguments:
        both = draw(pipe, kind, **arguments)
        pipe.unload_tuner_weights()
        assert identical(draw(pipe, kind, **arguments), peer_alone)
        pipe.load_tuner_weights(make_tuner(parts["unet"], tuner), "tuner")
        assert identical(draw(pipe, kind, **arguments), both)
    assert identical(draw(without_peer, text_to_image), tuner_alone)
    without_peer.unload_tuner_weights()
    assert identical(draw(without_peer, text_to_image), neither)
    pictures = [neither, peer_alone, tuner_alone, both]
    assert min(difference(*pair) for pair in itertools.combinations(pictures, 2)) > 1e-2
