"""Fields that clients of A1111 always send pass; a function that they ask for and this server lacks is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from restune_diffusion.serving.http.a1111.options import refuse_missing_functions
from restune_diffusion.serving.http.a1111.samplers import scheduler_of
from restune_diffusion.serving.http.bodies import Img2ImgBody, Txt2ImgBody, read_body
from restune_diffusion.serving.http.errors import RequestError

from .a1111_payloads import ALL_FIELDS, PAYLOADS

SERVICE = SimpleNamespace(base=SimpleNamespace(name="restune-tiny"), base_names=frozenset({"base", "restune-tiny"}))


def accepted(values, body_class=Txt2ImgBody):
    body = read_body(body_class, values)
    refuse_missing_functions(body, SERVICE)
    return body


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_default_body_of_a_client_is_one_image(name):
    body = accepted(PAYLOADS[name])
    assert (body.prompt, body.seed, body.steps, body.cfg_scale) == ("a red apple", 5, 2, 4)
    assert (body.width, body.height, body.batch_size, body.n_iter, body.send_images) == (64, 64, 1, 1, True)
    assert scheduler_of(body.sampler_name or body.sampler_index, body.scheduler) == "euler"


def test_null_takes_the_default_of_an_image_to_image_request():
    values = dict.fromkeys(Img2ImgBody.model_fields) | {"init_images": ["x"], "mask": ""}
    assert accepted(values, Img2ImgBody) == Img2ImgBody(init_images=["x"], mask="")


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"enable_hr": True}, "enable_hr"),
        ({"save_images": True, "send_images": False}, "save_images"),
        ({"styles": ["", "Anime"]}, "styles"),
        ({"refiner_checkpoint": "other"}, "refiner_checkpoint"),
        ({"seed_resize_from_w": 512}, "seed_resize_from_w"),
        ({"infotext": "a fox\nSteps: 3"}, "infotext"),
        ({"alwayson_scripts": {"ADetailer": {"args": [True, False, {"ad_model": "face"}]}}}, "alwayson_scripts"),
        ({"alwayson_scripts": {"ADetailer": {"args": [{"ad_model": "face"}]}}}, "alwayson_scripts"),
        (
            {"alwayson_scripts": {"ControlNet": {"args": [{"enabled": False}, {"enabled": True}]}}},
            "alwayson_scripts",
        ),
        ({"alwayson_scripts": {"reactor": {"args": {"image": "x"}}}}, "alwayson_scripts"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, "CLIP_stop_at_last_layers"),
        ({"override_settings": {"sd_vae": "other.safetensors"}}, "sd_vae"),
        ({"override_settings": {"forge_additional_modules": ["t5.safetensors"]}}, "forge_additional_modules"),
        ({"override_settings": {"randn_source": "GPU"}}, "randn_source"),
        ({"override_settings": {"no_such_option": 1}}, "no_such_option"),
    ],
)
def test_a_function_that_the_server_lacks_is_refused_by_name(values, name):
    with pytest.raises(RequestError, match=f"`{name}`") as caught:
        accepted(ALL_FIELDS | values)
    assert caught.value.status == 400
    assert caught.value.param == name


@pytest.mark.parametrize(
    "checkpoint",
    [None, "", "base", "restune-tiny", "restune-tiny.safetensors", "restune-tiny [6ce0161689]",
     "restune-tiny.ckpt [6ce0161689]"],
)  # fmt: skip
def test_the_base_is_found_by_its_titles(checkpoint):
    accepted(ALL_FIELDS | {"override_settings": {"sd_model_checkpoint": checkpoint}})


@pytest.mark.parametrize("checkpoint", ["sd15", "restune-tiny.pt", ".safetensors", "restune-tiny [hash]", 7, []])
def test_another_checkpoint_does_not_exist(checkpoint):
    with pytest.raises(RequestError, match="does not exist; this server has `restune-tiny`") as caught:
        accepted(ALL_FIELDS | {"override_settings": {"sd_model_checkpoint": checkpoint}})
    assert caught.value.status == 404
