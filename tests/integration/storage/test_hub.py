from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import yaml
from PIL import Image

from restune_diffusion import BypassConfig, RestuneError, SkipConfig, Tuner, TunerFileError, read_info, save_tuner
from restune_diffusion.storage.hub import hub_files, push_to_hub
from restune_diffusion.storage.model_card import model_card

from ...conftest import ROOT, TINY_BASE, make_unet, randomize
from ...fake_hub import COMMIT, FakeHub

TRAINING = {
    "steps": 120,
    "images": 24,
    "resolution": 64,
    "config": {"prompt": "ink style", "learning_rate": 1e-4, "base": "/home/someone/secret/base"},
}


def card_of(path, **changes):
    """Split a card in its front matter, as YAML reads it, and its text."""
    _, front, text = model_card(read_info(path), "artist/ink", **changes).split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.fixture
def path(tmp_path):
    unet = make_unet()
    unet.register_to_config(_name_or_path="stabilityai/sd-tiny")
    tuner = Tuner.for_base(unet, SkipConfig(ratio=0.1), BypassConfig())
    save_tuner(tuner, tmp_path / "ink.safetensors", training=TRAINING, metadata={"modelspec.license": "mit"})
    return tmp_path / "ink.safetensors"


def test_the_front_matter_is_what_the_hub_reads(path):
    front, text = card_of(path, samples={"images/00.png": 'a "fox": ---\nink'})
    assert front["base_model"] == "stabilityai/sd-tiny"
    assert front["base_model_relation"] == "adapter"
    assert front["license"] == "mit"
    assert front["pipeline_tag"] == "text-to-image"
    assert {"restune-skip", "restune-bypass", "res-tuning"} <= set(front["tags"])
    assert front["instance_prompt"] == "ink style"
    (widget,) = front["widget"]
    assert widget["output"] == {"url": "images/00.png"}
    assert widget["text"] == 'a "fox": --- ink'
    assert "<Gallery />" in text


def test_the_text_says_how_to_use_it_and_what_was_done(path):
    _, text = card_of(path)
    assert text.lstrip().startswith("# ink\n")
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "RestuneStableDiffusionPipeline.from_pretrained('stabilityai/sd-tiny')" in code
    assert "pipe.load_tuner_weights('artist/ink')" in code
    assert "ink style" in code
    assert "| steps | 120 |" in text
    assert "| learning rate | 0.0001 |" in text
    assert f"{read_info(path).num_parameters:,} parameters" in text
    assert "<Gallery />" not in text
    assert "secret" not in text


def test_a_tuner_without_facts_gets_a_card_too(tmp_path):
    tuner = Tuner.for_base(make_unet(), SkipConfig(ratio=0.1))
    save_tuner(tuner, tmp_path / "a.safetensors", metadata={"modelspec.title": "a `b`\n# c <script>"})
    front, text = card_of(tmp_path / "a.safetensors")
    assert "base_model" not in front
    assert "license" not in front
    assert "## Training" not in text
    assert "# a b # c script" in text
    front, _ = card_of(tmp_path / "a.safetensors", base_model="x/y", license="apache-2.0")
    assert (front["base_model"], front["license"]) == ("x/y", "apache-2.0")


def test_what_would_be_uploaded(path):
    image = Image.new("RGB", (4, 4), "red")
    files = hub_files(path, "artist/ink", samples=[("a fox", image), ("a cat", image)])
    assert files.keys() == {"pytorch_tuner_weights.safetensors", "README.md", "images/00.png", "images/01.png"}
    assert files["pytorch_tuner_weights.safetensors"] == path.read_bytes()
    assert Image.open(io.BytesIO(files["images/01.png"])).getpixel((0, 0)) == (255, 0, 0)
    assert b"images/01.png" in files["README.md"]
    (path.parent / "b.safetensors").write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TunerFileError, match=r"truncated|damaged"):
        hub_files(path.parent / "b.safetensors", "artist/ink")


def test_without_a_connection_it_says_so(path):
    # The tests run with HF_HUB_OFFLINE=1, or without a network.
    with pytest.raises(RestuneError, match="was not uploaded to artist/ink"):
        push_to_hub(path, "artist/ink", token="hf_x")
    with pytest.raises(RestuneError, match="was not uploaded to no id at all"):
        push_to_hub(path, "no id at all", token="hf_x")


def run_as_user(code: str, home: str, endpoint: str, **environment: str) -> str:
    """Run code in a process of its own, as the Hub's address is read when its library loads."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": home, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT),
             "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


LOAD = f"""
    import torch
    from restune_diffusion import RestuneError, RestuneStableDiffusionPipeline
    pipe = RestuneStableDiffusionPipeline.from_pretrained({str(TINY_BASE)!r})
    pipe.load_tuner_weights("artist/ink")
    print(pipe.get_list_tuners())
    (tuner,) = pipe.unet._forward_pre_hooks.values()
    print(tuner.__self__.tuner("ink").state_dict()["skip.skip.0.down.bias"].tolist())
    try:
        pipe.load_tuner_weights("artist/other")
    except RestuneError as error:
        print(type(error).__name__, error)
"""


def test_up_to_the_hub_and_down_again_then_offline(components, tmp_path):
    tuner = Tuner.for_base(components["unet"], SkipConfig(ratio=0.05))
    randomize(tuner)
    save_tuner(tuner, tmp_path / "ink.safetensors")
    expected = tuner.state_dict()["skip.skip.0.down.bias"]
    hub, home = FakeHub(), str(tmp_path / "home")
    push = f"""
    from PIL import Image
    from restune_diffusion import push_to_hub
    print(push_to_hub({str(tmp_path / "ink.safetensors")!r}, "artist/ink", token="hf_x",
                      samples=[("a fox", Image.new("RGB", (2, 2)))], commit_message="Ink"))
    """
    address, names, values, refusal = run_as_user(push + LOAD, home, hub.url).splitlines()
    assert address == f"{hub.url}/artist/ink/commit/{COMMIT}"
    assert hub.files.keys() == {"pytorch_tuner_weights.safetensors", "README.md", "images/00.png"}
    assert hub.files["pytorch_tuner_weights.safetensors"] == (tmp_path / "ink.safetensors").read_bytes()
    assert hub.commit_header["summary"] == "Ink"
    assert names == "{'ink': 1.0}"
    torch.testing.assert_close(torch.tensor(json.loads(values)), expected)
    assert refusal.startswith("TunerFileError There is no local file or folder artist/other")

    hub.shutdown()
    hub.server_close()
    asked = len(hub.requests)
    names, values, refusal = run_as_user(LOAD, home, hub.url, HF_HUB_OFFLINE="1").splitlines()
    assert names == "{'ink': 1.0}"
    torch.testing.assert_close(torch.tensor(json.loads(values)), expected)
    assert refusal.startswith("TunerFileError There is no local file or folder artist/other")
    assert len(hub.requests) == asked
