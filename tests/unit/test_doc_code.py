"""Python blocks of the docs run on the bundled base; their imports, and the extras that the docs name, exist.

A block runs by itself, in a folder with the files of `files` and the names of `given`. Full-size bases, CUDA, half
precision and long schedules are replaced as in `STAND_INS`. A block that cannot run is preceded by
`<!-- not run: REASON -->`; only its imports are checked.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from restune_diffusion import (
    ControlConfig,
    ResConfig,
    RestuneStableDiffusionPipeline,
    SkipConfig,
    TextConfig,
    Tuner,
    save_tuner,
    text_encoders,
)

from ..conftest import ROOT, TINY_BASE, randomize
from ..tiny_pipelines import sdxl_components

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/*.md", "benchmarks/**/*.md", "integrations/**/*.md")
    for path in (*ROOT.glob(pattern), *(ROOT / "restune_diffusion" / "assets").glob("*/README.md"))
)
BLOCK = re.compile(r"(?:<!-- not run: (.+?) -->\n)?```(?:python|py)\n(.*?)```", re.DOTALL)
STAND_INS = {
    r'"(stable-diffusion-v1-5/|\./)stable-diffusion-v1-5"': repr(str(TINY_BASE)),
    r'"restune_diffusion/assets/restune-tiny"': repr(str(TINY_BASE)),
    r'"stabilityai/stable-diffusion-xl-base-1\.0"': '"sdxl"',
    r'"cuda"': '"cpu"',
    r"torch\.float16": "torch.float32",
    r"width=768": "width=96",
    # The engine counts the steps of a request before the scheduler does.
    r"strength=0\.6": "strength=0.6, steps=4",
    r"\b(num_inference_)?steps=\d+": r"\1steps=4",
    r"share_steps=\d+": "share_steps=2",
}
"""What a block names, as a pattern, and what the test has instead."""
CLIENTS = {"openai", "webuiapi"}
"""Clients of the server that the docs show and the tests do not install."""


def blocks() -> list[Any]:
    found = []
    for page in dict.fromkeys(PAGES):
        text = page.read_text("utf-8")
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start(2)) + 1
            found.append(pytest.param(block[2], block[1], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


BLOCKS = blocks()


@pytest.mark.parametrize(("block", "reason"), BLOCKS)
def test_the_imports_of_a_block_exist(block: str, reason: str | None):
    for node in ast.walk(ast.parse(block)):
        names = [each.name for each in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            if node.module in CLIENTS:
                assert reason
                continue
            module = importlib.import_module(node.module or "")
            for name in names:
                assert hasattr(module, name), f"{node.module} has no {name}"
        else:
            assert all(importlib.util.find_spec(name) or (name in CLIENTS and reason) for name in names)


@pytest.fixture(scope="module")
def files(components: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files that the blocks name."""
    folder = tmp_path_factory.mktemp("docs")
    unet = components["unet"]
    configs: dict[str, Any] = {
        "watercolor": ResConfig(width=4),
        "oil": ResConfig(width=4),
        "ink": SkipConfig(ratio=0.25),
        "out/tuner": ControlConfig(ratio=0.25),
        "out/several": ControlConfig(ratio=0.25, conditions=("canny", "palette")),
    }
    (folder / "out").mkdir()
    (folder / "tuners").mkdir()
    for name, config in configs.items():
        tuner = Tuner.for_base(unet, config)
        randomize(tuner, std=0.02)
        save_tuner(tuner, folder / f"{name}.safetensors")
    dog = TextConfig(tokens=("<dog>",), initializers=("dog",), rank=0)
    encoders = text_encoders(StableDiffusionPipeline(**components, requires_safety_checker=False))
    save_tuner(Tuner.for_base(unet, dog, text=encoders), folder / "dog.safetensors")
    xl = {name: each for name, each in sdxl_components().items() if name != "controlnet"}
    StableDiffusionXLPipeline(**xl).save_pretrained(folder / "sdxl")
    save_tuner(Tuner.for_base(xl["unet"], SkipConfig()), folder / "out" / "watercolor-xl.safetensors")
    for copy in ("out/watercolor.safetensors", "tuners/watercolor.safetensors"):
        (folder / copy).write_bytes((folder / "watercolor.safetensors").read_bytes())
    Image.new("RGB", (64, 64), "red").save(folder / "sketch.png")
    (folder / "pipelines").symlink_to(ROOT / "pipelines")
    return folder


@pytest.fixture
def pipe(components: dict[str, Any]) -> RestuneStableDiffusionPipeline:
    """Return a pipeline with a U-Net of its own, because a block may compile it."""
    own = {**components, "unet": deepcopy(components["unet"])}
    return RestuneStableDiffusionPipeline(**own, requires_safety_checker=False)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the bundled base take at most four steps where a block does not state their number."""
    original = DDIMScheduler.set_timesteps

    def at_most_four(self: DDIMScheduler, steps: int, *arguments: Any, **named: Any) -> None:
        original(self, min(steps, 4), *arguments, **named)

    monkeypatch.setattr(DDIMScheduler, "set_timesteps", at_most_four)


@pytest.fixture
def workplace(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(files)
    return files


RUNNABLE = [pytest.param(each.values[0], id=each.id) for each in BLOCKS if not each.values[1]]


@pytest.mark.parametrize("block", RUNNABLE)
def test_a_block_of_the_docs_runs(block: str, workplace: Path, few_steps: None, pipe: RestuneStableDiffusionPipeline):
    for pattern, stand_in in STAND_INS.items():
        block = re.sub(pattern, stand_in, block)
    image = Image.new("RGB", (64, 64), "red")
    given = {"pipe": pipe, "unet": pipe.unet, "base": str(TINY_BASE), "image": image}
    exec(compile(block, "block", "exec"), given)


def test_the_extras_that_the_docs_name_exist():
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"])
    for page in dict.fromkeys(PAGES):
        for extras in re.findall(r"(?:restune-diffusion|-e \"?\.)\[([\w,-]+)\]", page.read_text("utf-8")):
            assert set(extras.split(",")) <= known, f"{page.relative_to(ROOT)}: {extras}"
