"""Settings for Ray Serve, without Ray."""

from __future__ import annotations

import json
import sys

import httpx
import pytest
import yaml

from restune_diffusion.cli.app import parse
from restune_diffusion.serving.cluster.app import ClusterSettings
from restune_diffusion.serving.cluster.hints import wanted_tuners
from restune_diffusion.serving.http.gate import key_digest
from restune_diffusion.serving.http.starting import ServerSettings
from restune_diffusion.utils.errors import RestuneError

from ....serving_process import unused_port


def test_a_config_file_for_serve_deploy_has_all_settings_and_no_key(tmp_path, capsys):
    path = tmp_path / "serve.yaml"
    arguments = ["--tuners", str(tmp_path), "--host", "0.0.0.0", "--port", "8123", "--api-key", "a-long-secret"]
    arguments += ["--max-rows", "32", "--min-replicas", "2", "--max-replicas", "5", "--gpus-per-replica", "0.5"]
    parse(["serve", *arguments, "--write-ray-config", str(path)]).run()
    assert capsys.readouterr().out.strip() == str(path)
    assert "a-long-secret" not in path.read_text()
    config = yaml.safe_load(path.read_text())
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8123}
    (application,) = config["applications"]
    assert application["import_path"] == "restune_diffusion.serving.cluster.app:build"
    server = ServerSettings(**application["args"]["server"])
    assert (server.tuners, server.max_rows) == (str(tmp_path), 32)
    assert server.base.endswith("assets/restune-tiny")
    assert server.key_digest == key_digest(b"a-long-secret")
    cluster = ClusterSettings(**application["args"]["cluster"])
    assert (cluster.min_replicas, cluster.max_replicas, cluster.gpus) == (2, 5, 0.5)


def test_ray_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RestuneError, match=r"--ray needs Ray Serve; run pip install 'restune-diffusion\[serve-ray\]'"):
        parse(["serve", "--ray"]).run()


def test_a_cluster_that_does_not_answer_is_one_sentence(monkeypatch):
    pytest.importorskip("ray")
    address = f"127.0.0.1:{unused_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RestuneError, match=f"No Ray cluster answers at {address}; correct RAY_ADDRESS, or unset it"):
        parse(["serve", "--ray"]).run()


@pytest.mark.parametrize(
    ("body", "tuners"),
    [
        ({"model": "water:0.8+ink"}, ["ink", "water"]),
        ({"model": "base", "tuners": [{"name": "ink"}, 3, {}]}, ["None", "base", "ink"]),
        ({"prompt": "a <lora:people/ann:0.5> <lora:ink>"}, ["ink", "people/ann"]),
        ([], []),
        (None, []),
    ],
)
def test_the_tuners_of_a_request_are_guessed(body, tuners):
    assert wanted_tuners(json.dumps(body).encode()) == tuners


def test_the_tuners_of_a_form_are_guessed():
    fields = [
        ("model", "water:0.8+ink"),
        ("prompt", "a fox"),
        ("tuners[][name]", "people/ann"),
        ("image", "x" * 300_000),
    ]
    for ordered in (fields, fields[::-1]):
        request = httpx.Request("POST", "http://host", files=[(name, (None, value)) for name, value in ordered])
        assert wanted_tuners(request.read()) == ["ink", "people/ann", "water"]


def test_a_body_that_is_not_json_wants_no_tuners():
    assert wanted_tuners(b"\xff") == wanted_tuners(b"[" * 10**6) == []
