"""The official `openai` client and the A1111 client `webuiapi` against a server process."""

from __future__ import annotations

import base64
import io
import json
import threading
import urllib.error
import urllib.request

import numpy as np
import openai
import pytest
import torch
import webuiapi
from PIL import Image, ImageDraw

from restune_diffusion.pipelines import RestuneStableDiffusionImg2ImgPipeline
from restune_diffusion.pipelines.schedulers import named_scheduler
from restune_diffusion.serving import Engine, ImageRequest

from ....serving_process import ServerProcess, wait_for
from .a1111_payloads import PAYLOADS

KEY = "key-of-the-test"


@pytest.fixture(scope="module")
def server(files):
    # Beyond loopback, where a key is required.
    with ServerProcess("--tuners", str(files), "--host", "0.0.0.0", env={"RESTUNE_API_KEY": KEY}) as process:
        yield process
        # Every fault of a request is a refusal, not an error of the server.
        assert "Traceback" not in process.output, process.output


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def webui(server):
    return webuiapi.WebUIApi("127.0.0.1", server.port, username="any", password=KEY)


@pytest.fixture(scope="module")
def photo():
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((12, 12, 52, 52), fill="red")
    draw.rectangle((28, 4, 36, 30), fill="green")
    return image


def bytes_of(image: Image.Image, name: str = "image.png") -> tuple[str, bytes, str]:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return name, stream.getvalue(), "image/png"


def decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def generated(pipe, prompt, seed, steps=2, guidance=4.0, **settings):
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=steps, guidance_scale=guidance, generator=generator, **settings).images[0]


def from_engine(pipe, prompt, settings):
    """diffusers' inpainting pipelines refuse the latents of the bundled base, which have 16 channels."""
    engine = Engine(pipe)
    ticket = engine.submit(ImageRequest(prompt, **settings))
    while engine.step():
        pass
    engine.close()
    return ticket.result(0).image


def assert_equal(served: Image.Image, expected: Image.Image) -> None:
    difference = np.abs(np.asarray(served.convert("RGB"), int) - np.asarray(expected, int))
    assert difference.max() <= 1


def get(server, path, key=KEY, body=None):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    data = None
    if body is not None:
        headers["content-type"], data = "application/json", json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, data, headers)) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def metric(server, name):
    return next(float(line.split()[-1]) for line in get(server, "/metrics")[1].splitlines() if line.startswith(name))


SETTINGS = {"steps": 2, "guidance": 4.0}


def test_openai_generates_what_the_pipeline_generates(client, pipe):
    answer = client.images.generate(
        prompt="a red apple", n=2, size="64x64", extra_body=SETTINGS | {"seed": 5, "negative_prompt": "blue"}
    )
    assert answer.size == "64x64"
    assert answer.output_format == "png"
    for number, entry in enumerate(answer.data):
        expected = generated(pipe, "a red apple", 5 + number, negative_prompt="blue", width=64, height=64)
        image = decoded(entry.b64_json)
        assert_equal(image, expected)
        record = json.loads(image.info["restune"])
        assert (record["prompt"], record["seed"], record["steps"]) == ("a red apple", 5 + number, 2)
        assert f"CFG scale: 4, Seed: {5 + number}, Size: 64x64" in image.info["parameters"]


def test_openai_takes_tuners_as_a_model_name_and_as_a_list(client, pipe, files):
    mixed = client.images.generate(
        prompt="a tulip", model="water:0.8+ink:0.5", extra_body=SETTINGS | {"seed": 1, "scheduler": "euler"}
    )
    listed = client.images.generate(
        prompt="a tulip",
        model="water:0.8",
        extra_body=SETTINGS | {"seed": 1, "scheduler": "euler", "tuners": [{"name": "ink", "weight": 0.5}]},
    )
    base = client.images.generate(prompt="a tulip", model="base", extra_body=SETTINGS | {"seed": 1})
    for name in ("water", "ink"):
        pipe.load_tuner_weights(files / f"{name}.safetensors", tuner_name=name)
    pipe.set_tuners({"water": 0.8, "ink": 0.5})
    pipe.scheduler = named_scheduler("euler", pipe.scheduler)
    expected = generated(pipe, "a tulip", 1)
    assert_equal(decoded(mixed.data[0].b64_json), expected)
    assert_equal(decoded(listed.data[0].b64_json), expected)
    assert base.data[0].b64_json != mixed.data[0].b64_json


def test_openai_edits_an_image_and_repaints_the_transparent_area_of_a_mask(client, pipe, photo):
    edit = client.images.edit(
        image=bytes_of(photo), prompt="a blue ball", extra_body=SETTINGS | {"seed": 3, "steps": 4, "strength": 0.5}
    )
    variant = RestuneStableDiffusionImg2ImgPipeline.from_pipe(pipe)
    variant.set_progress_bar_config(disable=True)
    assert_equal(decoded(edit.data[0].b64_json), generated(variant, "a blue ball", 3, 4, image=photo, strength=0.5))
    mask = Image.new("RGBA", photo.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    answer = client.images.edit(
        image=bytes_of(photo), mask=bytes_of(mask, "mask.png"), prompt="a blue ball",
        extra_body=SETTINGS | {"seed": 3, "tuners": [{"name": "ink", "weight": 0}]},
    )  # fmt: skip
    white_left = Image.new("L", photo.size, 0)
    white_left.paste(255, (0, 0, 32, 64))
    settings = {"seed": 3, "steps": 2, "guidance": 4.0, "image": photo, "mask": white_left, "strength": 1.0}
    assert_equal(decoded(answer.data[0].b64_json), from_engine(pipe, "a blue ball", settings))


def test_openai_streams_partial_images_and_the_final_one(client):
    settings = SETTINGS | {"seed": 2, "steps": 6}
    stream = client.images.generate(
        prompt="a cat face", stream=True, partial_images=2, output_format="webp", extra_body=settings
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert {decoded(event.b64_json).format for event in events} == {"WEBP"}
    assert len({event.b64_json for event in events}) == 3
    whole = client.images.generate(prompt="a cat face", output_format="webp", extra_body=settings)
    assert whole.data[0].b64_json == events[-1].b64_json


def test_openai_streams_an_edit(client, photo):
    events = list(client.images.edit(image=bytes_of(photo), prompt="a ball", stream=True, extra_body=SETTINGS))
    assert [event.type for event in events] == ["image_edit.completed"]
    assert decoded(events[0].b64_json).size == (64, 64)


def test_openai_lists_the_tuners_as_models(client):
    assert [model.id for model in client.models.list()] == ["base", "ink", "water", "watercolor"]
    assert client.models.retrieve("ink").families == ["skip"]
    assert client.models.retrieve("water:0.8+ink:0.4").id == "water:0.8+ink:0.4"
    with pytest.raises(openai.NotFoundError, match=r"The model `\.\./secret` does not exist"):
        client.models.retrieve("../secret")


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "The model `nobody` does not exist"),
        ({"model": "ink:much"}, openai.BadRequestError, "The weight `much` of the model `ink:much` is not a number"),
        ({"size": "65x64"}, openai.BadRequestError, "A size of 65x64 is not possible; use multiples of 8 up to 2048."),
        ({"n": 99}, openai.BadRequestError, "`n` is 99; this server generates 16 images at most."),
        ({"extra_body": {"stepz": 3}}, openai.BadRequestError, "Unknown parameter `stepz`; leave it out."),
        ({"extra_body": {"scheduler": "fast"}}, openai.BadRequestError, "The scheduler `fast` is unknown"),
    ],
)
def test_openai_gets_one_sentence_for_a_mistake(client, arguments, kind, sentence):
    with pytest.raises(kind) as caught:
        client.images.generate(prompt="a fox", **arguments)
    assert sentence in caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"


def test_without_the_key_only_probes_are_answered(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError, match="needs an API key"):
        client.models.list()
    assert get(server, "/metrics", key=None)[0] == 401
    assert get(server, "/sdapi/v1/options", key="wrong")[0] == 401
    assert get(server, "/healthz", key=None) == (200, '{"status":"ok"}')
    assert get(server, "/readyz", key=None) == (200, '{"status":"ready"}')


def test_metrics_count_images_and_requests(server, client):
    before = metric(server, "restune_images_total")
    client.images.generate(prompt="a fox", n=2, extra_body=SETTINGS)
    assert metric(server, "restune_images_total") == before + 2
    assert metric(server, 'restune_image_latency_seconds_bucket{le="+Inf"}') == before + 2
    assert metric(server, 'restune_http_requests_total{route="/v1/images/generations",status="200"}') >= 1


def test_webui_generates_with_tuners_of_the_prompt(webui, pipe, files):
    result = webui.txt2img(
        prompt="an alien <lora:ink:0.7>", seed=4, steps=2, cfg_scale=4, width=64, height=64, batch_size=2,
        sampler_name="DPM++ 2M", scheduler="Karras",
    )  # fmt: skip
    pipe.load_tuner_weights(files / "ink.safetensors", tuner_name="ink")
    pipe.set_tuners({"ink": 0.7})
    pipe.scheduler = named_scheduler("dpmpp_2m_karras", pipe.scheduler)
    for number, image in enumerate(result.images):
        assert_equal(image, generated(pipe, "an alien", 4 + number, width=64, height=64))
    assert result.info["all_seeds"] == [4, 5]
    assert result.info["infotexts"][0].startswith("an alien <lora:ink:0.7>\nSteps: 2, Sampler: DPM++ 2M")
    shown = webui.png_info(result.image)
    assert shown.info == result.info["infotexts"][0]
    assert shown.parameters["Seed"] == "4"


@pytest.mark.parametrize("name", PAYLOADS)
def test_bodies_with_the_defaults_of_a1111s_clients_give_the_image(server, pipe, name):
    status, text = get(server, "/sdapi/v1/txt2img", body=PAYLOADS[name])
    assert status == 200, text
    pipe.scheduler = named_scheduler("euler", pipe.scheduler)
    assert_equal(decoded(json.loads(text)["images"][0]), generated(pipe, "a red apple", 5, width=64, height=64))


def test_webui_sends_its_defaults(webui, pipe, photo):
    pipe.scheduler = named_scheduler("euler_a", pipe.scheduler)
    image = webui.txt2img(prompt="a red apple", seed=5, steps=2, cfg_scale=4, width=64, height=64).image
    assert_equal(image, generated(pipe, "a red apple", 5, width=64, height=64))
    assert webui.img2img([photo], prompt="a ball", steps=2, width=64, height=64).image.size == (64, 64)


def test_options_that_a_client_has_read_can_be_sent_back(server):
    status, text = get(server, "/sdapi/v1/options")
    values = json.loads(text) | {"samples_save": True, "sd_model_checkpoint": "restune-tiny.safetensors"}
    assert (status, get(server, "/sdapi/v1/options", body=values)) == (200, (200, "{}"))
    assert json.loads(get(server, "/sdapi/v1/options")[1]) == json.loads(text)


def test_webui_changes_an_image_and_repaints_an_area(webui, pipe, photo):
    settings = {"prompt": "a ball", "seed": 6, "cfg_scale": 4, "width": 64, "height": 64, "sampler_name": "Euler"}
    changed = webui.img2img([photo], steps=4, denoising_strength=0.5, **settings)
    pipe.scheduler = named_scheduler("euler", pipe.scheduler)
    variant = RestuneStableDiffusionImg2ImgPipeline.from_pipe(pipe)
    variant.set_progress_bar_config(disable=True)
    assert_equal(changed.image, generated(variant, "a ball", 6, 4, image=photo, strength=0.5))
    mask = Image.new("L", photo.size, 0)
    mask.paste(255, (32, 0, 64, 64))
    whole = webui.img2img(
        [photo], mask_image=mask, mask_blur=0, inpainting_fill=1, inpaint_full_res=False, steps=3,
        denoising_strength=0.75, **settings,
    )  # fmt: skip
    request = {"seed": 6, "steps": 3, "guidance": 4.0, "image": photo, "mask": mask, "strength": 0.75}
    assert_equal(whole.image, from_engine(pipe, "a ball", request | {"scheduler": "euler"}))
    # Only the masked area is generated and pasted back.
    part = webui.img2img([photo], mask_image=mask, mask_blur=0, steps=3, denoising_strength=0.75, **settings)
    assert np.array_equal(np.asarray(part.image)[:, :32], np.asarray(photo)[:, :32])
    assert not np.array_equal(np.asarray(part.image)[:, 32:], np.asarray(photo)[:, 32:])


def test_webui_follows_and_interrupts_a_request(server, webui):
    webui.set_options({"live_previews_enable": True, "show_progress_every_n_steps": 2})
    results = []
    settings = {"prompt": "a dog face", "steps": 150, "width": 128, "height": 128}
    request = threading.Thread(target=lambda: results.append(webui.txt2img(**settings)))
    request.start()
    watcher = webuiapi.WebUIApi("127.0.0.1", server.port, username="any", password=KEY)
    wait_for(lambda: watcher.get_progress()["current_image"])
    progress = watcher.get_progress()
    assert 0 < progress["progress"] < 1
    assert progress["state"]["sampling_steps"] == 150
    assert decoded(progress["current_image"]).size == (128, 128)
    cancelled = metric(server, "restune_images_cancelled_total")
    assert watcher.interrupt() == {}
    request.join(60)
    assert results[0].images == []
    assert results[0].info["interrupted"] is True
    assert watcher.get_progress()["progress"] == 0
    assert metric(server, "restune_images_cancelled_total") == cancelled + 1
    webui.set_options({"live_previews_enable": False})


def test_webui_lists_what_the_server_has(webui):
    assert [lora["name"] for lora in webui.get_loras()] == ["ink", "water", "watercolor"]
    assert webui.util_get_model_names() == ["restune-tiny"]
    assert webui.util_get_current_model() == "restune-tiny"
    assert "Euler a" in webui.util_get_sampler_names()
    assert webui.util_get_scheduler_names() == ["automatic", "beta", "exponential", "karras"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prompt": "<lora:../etc/passwd:1>"}, "The tuner `../etc/passwd` of the tag"),
        ({"prompt": "a", "sampler_name": "Warp"}, "Unknown sampler `Warp`; GET /sdapi/v1/samplers lists them."),
        ({"prompt": "a", "enable_hr": True}, "`enable_hr` is not supported by this server; leave it out."),
        ({"prompt": "a", "steps": "many"}, "Invalid `steps`: input should be a valid integer"),
    ],
)
def test_webui_gets_one_sentence_for_a_mistake(webui, arguments, sentence):
    with pytest.raises(RuntimeError) as caught:
        webui.txt2img(**arguments)
    status, text = caught.value.args
    assert 400 <= status < 500
    assert json.loads(text)["detail"].startswith(sentence)


def test_a_disconnected_client_frees_its_rows(server):
    import socket

    cancelled = metric(server, "restune_images_cancelled_total")
    body = json.dumps({"prompt": "a fox", "steps": 150, "size": "128x128", "n": 3}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body)
        wait_for(lambda: metric(server, "restune_running_images") > 0)
    wait_for(lambda: metric(server, "restune_images_cancelled_total") == cancelled + 3)
    wait_for(lambda: metric(server, "restune_running_images") == 0)
