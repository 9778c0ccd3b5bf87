"""A server with a tuner of a repository on the Hub, and one that takes condition images."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys

import numpy as np
import openai
import pytest
import torch
from PIL import Image, ImageDraw

from restune_diffusion import ControlConfig, Tuner, save_tuner

from ....conftest import ROOT, randomize
from ....fake_hub import FakeHub
from ....serving_process import ServerProcess

SETTINGS = {"steps": 3, "guidance": 4.0, "seed": 5}


@pytest.fixture(scope="module")
def control(components, tmp_path_factory):
    """Folder with a control tuner."""
    folder = tmp_path_factory.mktemp("control")
    tuner = Tuner.for_base(components["unet"], ControlConfig(ratio=0.5))
    randomize(tuner, 3, std=0.1)
    save_tuner(tuner, folder / "edges.safetensors")
    return folder


@pytest.fixture(scope="module")
def hub(files):
    with FakeHub() as hub:
        hub.files["pytorch_tuner_weights.safetensors"] = (files / "ink.safetensors").read_bytes()
        yield hub
        hub.shutdown()


@pytest.fixture(scope="module")
def client(hub, control, tmp_path_factory):
    home = str(tmp_path_factory.mktemp("hub"))
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_OFFLINE": "0"}
    with (
        ServerProcess("--tuners", str(control), "--tuner-repos", "artist/ink", env=env) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def expected(pipe, prompt, **options):
    generator = torch.Generator().manual_seed(SETTINGS["seed"])
    steps, guidance = SETTINGS["steps"], SETTINGS["guidance"]
    return pipe(prompt, num_inference_steps=steps, guidance_scale=guidance, generator=generator, **options).images[0]


def served(client, prompt, model, **more):
    answer = client.images.generate(prompt=prompt, model=model, size="64x64", extra_body=SETTINGS | more)
    return Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))


def assert_same(found: Image.Image, wanted: Image.Image) -> None:
    assert np.abs(np.asarray(found.convert("RGB"), int) - np.asarray(wanted, int)).max() <= 1


def test_a_tuner_of_the_hub_is_named_by_its_repository(client, hub, files, pipe):
    assert {model.id for model in client.models.list()} == {"base", "edges", "artist/ink"}
    plain = expected(pipe, "a red apple")
    pipe.load_tuner_weights(files / "ink.safetensors", "ink")
    wanted = expected(pipe, "a red apple")
    assert not np.array_equal(plain, wanted)
    assert_same(served(client, "a red apple", "artist/ink"), wanted)
    asked = [line for line in hub.requests if line.startswith("GET /artist/ink/resolve/")]
    assert len(asked) == 1


def test_condition_images_reach_a_control_tuner(client, control, pipe):
    image = Image.new("RGB", (64, 64), "black")
    ImageDraw.Draw(image).ellipse((10, 10, 54, 54), outline="white", width=3)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    pipe.load_tuner_weights(control / "edges.safetensors", "edges")
    wanted = expected(pipe, "a red apple", tuner_image=image)
    black = expected(pipe, "a red apple", tuner_image=Image.new("RGB", (64, 64)))
    assert not np.array_equal(wanted, black)
    conditions = {"condition": base64.b64encode(stream.getvalue()).decode()}
    assert_same(served(client, "a red apple", "edges", conditions=conditions), wanted)
    with pytest.raises(openai.BadRequestError, match="condition"):
        served(client, "a red apple", "edges")


@pytest.mark.parametrize(
    ("repository", "sentence"),
    [
        ("artist/nothing", "There is no local file or folder artist/nothing, and the download from the Hub failed"),
        ("./ink.safetensors", "--tuner-repos ./ink.safetensors is not a repository id such as artist/ink"),
    ],
)
def test_a_repository_that_is_not_there_is_refused_at_the_start(hub, tmp_path, repository, sentence):
    ended = subprocess.run(
        [sys.executable, "-m", "restune_diffusion", "serve", "--port", "0", "--tuner-repos", repository],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"},
    )
    assert ended.returncode != 0
    assert sentence in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
