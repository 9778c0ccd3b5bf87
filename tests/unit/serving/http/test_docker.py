"""The container's command line is one that `restune serve` takes."""

from __future__ import annotations

import json
import re

import yaml

from restune_diffusion.cli.app import parse

from ....conftest import ROOT


def test_the_image_starts_a_server_that_needs_a_key(monkeypatch):
    text = (ROOT / "docker" / "Dockerfile").read_text()
    command = [json.loads(re.search(rf"^{name} (\[.*\])$", text, re.MULTILINE)[1]) for name in ("ENTRYPOINT", "CMD")]
    assert command[0] == ["restune", "serve"]
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE)
    assert all((ROOT / name).exists() for names in copied for name in names.split())
    monkeypatch.setenv("RESTUNE_API_KEY", "key-of-the-test")
    assert parse(["serve", *command[1]]).key() == "key-of-the-test"


def test_compose_runs_the_image_with_flags_that_exist():
    service = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]["restune"]
    options = parse(["serve", *service["command"]])
    assert (options.host, str(options.tuners), options.max_rows) == ("0.0.0.0", "/tuners", 16)
    assert f"{options.port}:{options.port}" in service["ports"][0]
    assert int(service["stop_grace_period"].removesuffix("s")) > options.grace_seconds
    assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
