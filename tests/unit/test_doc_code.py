"""The Python blocks of the docs: what they import exists, and those that need no network, server or GPU run.

A page's blocks run in one namespace, in a folder with the files that the pages name: the bundled base, as Stable
Diffusion 1.5, and tuners for it. Images take two denoising steps, in float32 on the CPU.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pytest_examples import CodeExample, find_examples

from restune_diffusion import (
    RestuneStableDiffusionPipeline,
    SkipConfig,
    TextConfig,
    Tuner,
    enable_restune,
    save_tuner,
    schedule,
)

from ..conftest import ROOT, TINY_BASE, make_unet, randomize

PAGES = ("README.md", "CONTRIBUTING.md", "docs", "examples/README.md", "restune_diffusion/assets")
BLOCKS = [block for block in find_examples(*(str(ROOT / page) for page in PAGES)) if block.prefix == "python"]
RUN = {
    # Page, and texts of the blocks that are left out.
    "README.md": (),
    "docs/index.md": (),
    "docs/how-to/mixing.md": (),
    "docs/pipelines.md": ("custom_pipeline", "enable_pag", "unet.compile"),
    "docs/serving.md": ("OpenAI(", "webuiapi"),
    "restune_diffusion/assets/restune-tiny/README.md": (),
}
CHANGES = {'.to("cuda")': "", "torch.float16": "torch.float32"}


def page_of(block: CodeExample) -> str:
    return Path(block.path).relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{page_of(block)}:{block.start_line}")
def test_what_a_block_imports_exists(block: CodeExample):
    for module, name in imports(ast.parse(block.source)):
        loaded = importlib.import_module(module)
        assert name is None or hasattr(loaded, name), f"{module} has no {name}"


@pytest.fixture(scope="module")
def place(components: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the files that the pages name."""
    folder = tmp_path_factory.mktemp("docs")
    base = folder / "stable-diffusion-v1-5"
    base.mkdir()
    for part in TINY_BASE.iterdir():
        (base / part.name).symlink_to(part)
    (base / "stable-diffusion-v1-5").symlink_to(TINY_BASE)
    (folder / "restune_diffusion").symlink_to(ROOT / "restune_diffusion")
    for out in ("out", "tuners"):
        (folder / out).mkdir()
    pipe = RestuneStableDiffusionPipeline(**components, requires_safety_checker=False)
    dog = TextConfig(tokens=("<dog>",), initializers=("dog",))
    for name, config in {"watercolor": SkipConfig(ratio=0.25), "ink": SkipConfig(ratio=0.25), "dog": dog}.items():
        tuner = Tuner.for_pipeline(pipe, config)
        randomize(tuner, len(name), std=0.05)
        for path in (folder, folder / "out", folder / "tuners"):
            save_tuner(tuner, path / f"{name}.safetensors")
    Image.new("RGB", (64, 64), "teal").save(folder / "sketch.png")
    return folder


@pytest.mark.parametrize("page", RUN)
def test_the_blocks_of_a_page_run(page: str, place: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch):
    blocks = [
        block for block in BLOCKS if page_of(block) == page and not any(each in block.source for each in RUN[page])
    ]
    assert blocks
    call = RestuneStableDiffusionPipeline.__call__
    monkeypatch.setattr(
        RestuneStableDiffusionPipeline,
        "__call__",
        lambda self, *args, **options: call(self, *args, **{"num_inference_steps": 2, **options}),
    )
    monkeypatch.chdir(place)
    names = {"pipe": pipe, "unet": make_unet(), "schedule": schedule, "enable_restune": enable_restune}
    before = set(place.iterdir())
    for block in blocks:
        source = block.source
        for written, taken in CHANGES.items():
            source = source.replace(written, taken)
        code = compile("\n" * block.start_line + source, str(block.path), "exec")
        exec(code, names)
    saved = [path for path in set(place.iterdir()) - before if path.suffix == ".png"]
    for path in saved:
        assert Image.open(path).getextrema()[0][0] < Image.open(path).getextrema()[0][1]
        path.unlink()
    assert saved or ".save(" not in "".join(block.source for block in blocks)
